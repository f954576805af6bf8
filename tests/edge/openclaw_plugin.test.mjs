// The plugin's judging: which answer a word is on, which reactions count, and what happens while the edge is away.
import assert from "node:assert/strict";
import { test } from "node:test";
import {
  Judge,
  newState,
  reactionsIn,
  timeOf,
  valueOf,
} from "../../edge/clawloop_edge/openclaw/plugin/judging.mjs";

const S = "agent:main:x";
const T = Date.UTC(2026, 10, 22, 8, 40, 0);

/** A judge whose edge answers as told, whose clock stands, and whose timers are run by hand. */
function judged(...outcomes) {
  const it = { sent: [], waits: [], clock: T, state: newState() };
  const send = async (said) => {
    it.sent.push([said.target.step_id, said.value, said.comment]);
    it.keys = [...(it.keys ?? []), said.key];
    return outcomes.length > 1 ? outcomes.shift() : (outcomes[0] ?? "stored");
  };
  const later = (act, waitMs) => it.waits.push([act, waitMs]);
  it.judge = new Judge(it.state, { send, now: () => it.clock, later });
  it.tick = () => it.waits.shift()[0]();
  return it;
}

function event(seconds, what = "Telegram reaction added: 👍 by Alice (@alice) on msg 42") {
  return `System: [2026-11-22 08:40:${String(seconds).padStart(2, "0")} UTC] ${what}`;
}

test("emoji and names say good, bad, or nothing", () => {
  for (const good of ["👍", "👍🏽", "❤️", "❤️‍🔥", ":+1:", ":thumbsup::skin-tone-3:", "THUMBSUP", "🎉"])
    assert.equal(valueOf(good), 1, good);
  for (const bad of ["👎", "👎🏿", "🤦‍♂️", ":-1:", "💩"]) assert.equal(valueOf(bad), -1, bad);
  for (const other of ["👀", "🤔", ":eyes:", "", "constructor", "__proto__"]) assert.equal(valueOf(other), undefined, other);
});

test("moments are read in the zones that OpenClaw writes, and in no other", () => {
  for (const stamp of [
    "2026-11-22 08:40:00 UTC",
    "2026-11-22 09:40:00 GMT+1",
    "2026-11-22 14:10:00 GMT+5:30",
    "2026-11-22 03:40:00 EST",
  ])
    assert.equal(timeOf(stamp), T + 999, stamp);
  for (const stamp of ["unknown-time", "2026-11-22 08:40:00 XYZ"]) assert.equal(timeOf(stamp), undefined, stamp);
});

test("reactions are read in OpenClaw's own events, and nowhere else", () => {
  const lines = [
    event(1),
    event(2, "Slack reaction removed: :+1: by Bob in #x msg 1.2 from Claw"),
    event(3, "Discord super reaction added: 🔥 by Eve on server #x msg 7"),
    event(4, "Feishu[main] reaction added: :THUMBSUP: by ou_1 on msg om_1"),
    event(5, 'Node: he said "Telegram reaction added: 👍 by me"'),
    event(6, "The build is done."),
  ];
  const found = reactionsIn(lines.join("\n")).map(({ added, emoji, value }) => [added, emoji, value]);
  assert.deepEqual(found, [[true, "👍", 1], [false, ":+1:", 1], [true, "🔥", 1], [true, ":THUMBSUP:", 1]]);
  assert.deepEqual(reactionsIn(`[Thread history - for context]\n${event(1)}`), []);
});

test("a word is on the last answer of its own session", async () => {
  const it = judged();
  assert.equal(await it.judge.rated(S, 1, ""), "nothing");
  it.judge.answered(S, "r1", { step_id: "a" });
  it.judge.answered(S, "r2", { step_id: "b" });
  it.judge.answered(S, "r2", { step_id: "c" });
  it.judge.answered("other", "r3", { step_id: "d" });
  assert.equal(await it.judge.rated(S, -1, "too long"), "stored");
  assert.deepEqual(it.sent, [["c", -1, "too long"]]);
});

test("a reaction counts once, on the last answer before it", async () => {
  const it = judged();
  it.clock = T + 1000;
  it.judge.answered(S, "r1", { step_id: "a" });
  it.clock = T + 8000;
  it.judge.answered(S, "r2", { step_id: "b" });
  await it.judge.noticed(S, [event(5), event(5)]);
  await it.judge.noticed(S, [event(5)]);
  await it.judge.noticed(S, [event(0, "Telegram reaction added: 👍 by Al on msg 1")]);
  await it.judge.noticed(S, [event(9, "Telegram reaction added: 👎 by Al on msg 2")]);
  await it.judge.noticed(S, [event(9, "Telegram reaction added: 👀 by Al on msg 2")]);
  assert.deepEqual(it.sent, [["a", 1, "reaction 👍"], ["b", -1, "reaction 👎"]]);
});

test("a reaction that is taken back before it was sent is none", async () => {
  const it = judged("away", "stored");
  it.judge.answered(S, "r1", { step_id: "a" });
  const gone = "Slack reaction removed: :+1: by Bob in #x msg 1";
  await it.judge.noticed(S, [[event(1, "Slack reaction added: :+1: by Bob in #x msg 1"), event(2, gone)].join("\n")]);
  assert.deepEqual(it.sent, []);
  assert.deepEqual(await it.judge.noticed(S, [event(3, "Slack reaction added: :+1: by Bob in #x msg 1")]), ["away"]);
  await it.judge.noticed(S, [event(4, gone)]);
  await it.tick();
  assert.equal(it.sent.length, 1);
});

test("what the edge could not take is sent again, under the same key and ever more seldom", async () => {
  const it = judged("away", "away", "away", "stored");
  it.judge.answered(S, "r1", { step_id: "a" });
  assert.equal(await it.judge.rated(S, 1, ""), "away");
  assert.equal(it.waits.length, 1);
  const waits = [];
  for (let i = 0; i < 3; i++) {
    waits.push(it.waits[0][1]);
    await it.tick();
  }
  assert.deepEqual(waits, [5000, 10000, 20000]);
  assert.equal(new Set(it.keys).size, 1);
  assert.equal(it.sent.length, 4);
  assert.deepEqual([it.waits.length, it.state.waiting.size], [0, 0]);
});

test("only the latest word on an answer is sent again", async () => {
  const it = judged("away", "stored");
  it.judge.answered(S, "r1", { step_id: "a" });
  await it.judge.rated(S, 1, "");
  assert.equal(await it.judge.rated(S, -1, "no"), "stored");
  await it.tick();
  assert.deepEqual(it.sent.map(([, value]) => value), [1, -1]);
});

test("what is refused or unknown is not sent again, and memory is bounded", async () => {
  for (const outcome of ["refused", "unknown"]) {
    const it = judged(outcome);
    it.judge.answered(S, "r1", { step_id: "a" });
    assert.equal(await it.judge.rated(S, 1, "x".repeat(9999)), outcome);
    assert.equal(it.sent[0][2].length, 4096);
    assert.deepEqual([it.waits.length, it.state.waiting.size], [0, 0]);
  }
  const it = judged("away");
  for (let i = 0; i < 3000; i++) {
    it.judge.answered(`s${i}`, "r", { step_id: `${i}` });
    await it.judge.rated(`s${i}`, 1, "");
    await it.judge.noticed(`s${i}`, [event(59)]);
  }
  assert.deepEqual([it.state.turns.size, it.state.waiting.size, it.state.seen.size], [500, 500, 2000]);
});
