// clawloop's plugin for OpenClaw: `/good`, `/bad` and reactions become words on the answer that they are about, posted
// to the edge that gave it. It reads what was answered, and touches no prompt, tool, sandbox or message.
import { readFileSync } from "node:fs";
import { request } from "node:http";
import { definePluginEntry } from "openclaw/plugin-sdk/plugin-entry";
import { Judge, newState } from "./judging.mjs";

type Outcome = "stored" | "unknown" | "refused" | "away" | "nothing";
type Target = { step_id: string } | { trace_id: string };
type Word = { target: Target; value: 1 | -1; comment: string; key: string };
type Place = { url: URL; tokenFile: string };

const STATE = Symbol.for("clawloop.judging"); // register() runs several times in a process; hooks and commands share this
const RUNTIME_CONTEXT = "openclaw.runtime-context";
const LOOPBACK = new Set(["127.0.0.1", "localhost", "[::1]"]);
const ANSWER_MS = 5_000;
const AGAIN = "`clawloop-edge openclaw connect`";
const SAID: Record<Outcome, string> = {
  stored: "Noted.",
  nothing: "Not stored: I know of no answer in this conversation since OpenClaw started. Rate the next one.",
  unknown: "Not stored: clawloop does not have that answer. Another model gave it, or it was forgotten or not kept.",
  refused: `Not stored: clawloop's edge did not accept it. Run ${AGAIN} again, and see OpenClaw's log.`,
  away:
    "Not stored yet: clawloop's edge does not answer. I try again until OpenClaw stops; " +
    "`clawloop-edge status` says how it is.",
};

export default definePluginEntry({
  id: "clawloop",
  name: "clawloop",
  description: "/good, /bad and reactions tell clawloop's edge which answers to learn from.",
  register(api: any) {
    const place = edgeOf(api.pluginConfig ?? {});
    const warn = (text: string) => api.logger?.warn?.(`clawloop: ${text}`);
    const state = ((globalThis as any)[STATE] ??= newState());
    const judge = new Judge(state, { send: (word: Word) => send(place, word, warn) });

    api.on("llm_output", (event: any, ctx: any) => {
      const target = targetOf(event, ctx);
      if (ctx.trigger === "user" && ctx.sessionKey && target) judge.answered(ctx.sessionKey, ctx.runId, target);
    });
    api.on("llm_input", (event: any, ctx: any) => {
      // not awaited: the model call shall not wait for what is said of an earlier one
      if (ctx.sessionKey) judge.noticed(ctx.sessionKey, contextOf(event)).catch((error) => warn(String(error)));
    });
    for (const [name, value, said] of [["good", 1, "good"], ["bad", -1, "bad"]] as const) {
      api.registerCommand({
        name,
        description: `Tell clawloop that the last answer was ${said}; you may say why.`,
        acceptsArgs: true,
        handler: async (ctx: any) => {
          const outcome: Outcome = await judge.rated(ctx.sessionKey ?? "", value, (ctx.args ?? "").trim());
          return { text: SAID[outcome] };
        },
      });
    }
  },
});

/** Where the edge is. Throws, so that OpenClaw says why the plugin does not load, if that is not on this machine. */
function edgeOf(config: { url?: string; tokenFile?: string }): Place {
  const url = new URL(config.url ?? "");
  if (url.protocol !== "http:" || !LOOPBACK.has(url.hostname) || !config.tokenFile) {
    throw new Error(`clawloop: url must be http on loopback and tokenFile a path; run ${AGAIN} again`);
  }
  return { url, tokenFile: config.tokenFile };
}

/** What the edge calls the answer: the id that it came with; else the trace of its run. */
function targetOf(event: any, ctx: any): Target | undefined {
  const stepId = event.lastAssistant?.responseId;
  if (stepId) return { step_id: stepId };
  return ctx.trace?.traceId ? { trace_id: ctx.trace.traceId } : undefined;
}

/** The texts that OpenClaw itself put beside the messages of a model call. */
function contextOf(event: any): string[] {
  return (event.historyMessages ?? [])
    .filter((message: any) => message.customType === RUNTIME_CONTEXT)
    .flatMap((message: any) => message.details?.fragments ?? [])
    .map((fragment: any) => String(fragment.text ?? ""));
}

/** POST /v1/feedback. By node:http, which follows no proxy and no redirect: the token goes to this machine alone. */
async function send({ url, tokenFile }: Place, word: Word, warn: (text: string) => void): Promise<Outcome> {
  let token: string;
  try {
    token = readFileSync(tokenFile, "utf8").trim();
  } catch (error: any) {
    warn(`cannot read the edge's token file (${error.code}); run ${AGAIN} again`);
    return "refused";
  }
  const body = JSON.stringify({ ...word.target, value: word.value, comment: word.comment, source: "openclaw" });
  const headers = {
    authorization: `Bearer ${token}`,
    "content-type": "application/json",
    "content-length": Buffer.byteLength(body),
    "idempotency-key": word.key,
  };
  try {
    const status = await posted(new URL("/v1/feedback", url), headers, body);
    if (status === 200) return "stored";
    if (status === 404) return "unknown";
    warn(`the edge answered ${status} to feedback`);
    return status === 429 || status >= 500 ? "away" : "refused";
  } catch (error: any) {
    warn(`the edge does not answer (${error.code ?? error.name})`);
    return "away";
  }
}

function posted(url: URL, headers: Record<string, string | number>, body: string): Promise<number> {
  return new Promise((resolve, reject) => {
    const options = { method: "POST", headers, agent: false, signal: AbortSignal.timeout(ANSWER_MS) };
    const sent = request(url, options, (reply) => {
      reply.resume();
      reply.on("end", () => resolve(reply.statusCode ?? 0)).on("error", reject);
    });
    sent.on("error", reject).end(body);
  });
}
