// What was said of which answer: turns, reactions, and words on their way to the edge. Knows neither OpenClaw's plugin
// API nor the network: sending, the clock and timers are passed in. Formats as of OpenClaw 2026.9.6.

const GOOD =
  "👍 ❤ ❤‍🔥 🧡 💛 💚 💙 💜 🔥 👏 🙌 🎉 🥰 😍 🤩 👌 💯 🏆 🙏 💪 ⭐ 🌟 ✅ +1 thumbsup heart fire clap raised_hands tada " +
  "heart_eyes star-struck ok_hand 100 trophy pray muscle star white_check_mark";
const BAD =
  "👎 💩 🤮 🤢 🤬 😡 😠 🖕 💔 ❌ 🚫 🤦 🙄 -1 thumbsdown hankey poop face_vomiting nauseated_face rage angry " +
  "face_with_symbols_on_mouth middle_finger broken_heart x no_entry_sign face_palm face_with_rolling_eyes";
const VALUES = new Map([
  ...GOOD.split(" ").map((each) => [each, 1]),
  ...BAD.split(" ").map((each) => [each, -1]),
]);
const SHADES = /[\u{1F3FB}-\u{1F3FF}\uFE0F]|\u200D[♂♀]|:?:skin-tone-\d|^:|:$/gu;

const LINE =
  /^System: \[([^\]]{1,64})\] [A-Z][A-Za-z]*(?: [A-Z][A-Za-z]*)?(?:\[[^\]]{0,64}\])? (?:super )?reaction (added|removed): (\S{1,64}) (by .{1,400})$/u;
const STAMP = /^(\d{4}-\d{2}-\d{2}) (\d{2}:\d{2}:\d{2}) (?:(?:UTC|GMT)(?:([+-])(\d{1,2})(?::(\d{2}))?)?|([A-Z]{3,4}))$/;
const HOURS = { EST: -5, EDT: -4, CST: -6, CDT: -5, MST: -7, MDT: -6, PST: -8, PDT: -7, AKST: -9, AKDT: -8, HST: -10 };

const SESSIONS = 500;
const TURNS = 16; // of one session
const SEEN = 2000;
const WAITING = 500;
const COMMENT_CHARS = 4096;
const FIRST_RETRY_MS = 5_000;
const LAST_RETRY_MS = 300_000;

/** 1 for approval, -1 for the contrary, undefined for what says neither. Emoji, or a name as Slack writes it. */
export function valueOf(emoji) {
  return VALUES.get(emoji.replace(SHADES, "").toLowerCase());
}

/** The moment of a system event in ms since 1970, rounded up to the end of its second; undefined in an unknown zone. */
export function timeOf(stamp) {
  const found = STAMP.exec(stamp);
  if (!found) return undefined;
  const [, date, time, sign, hours, minutes, name] = found;
  if (name && !(name in HOURS)) return undefined;
  const offset = name ? HOURS[name] * 60 : (sign === "-" ? -1 : 1) * (Number(hours ?? 0) * 60 + Number(minutes ?? 0));
  return Date.parse(`${date}T${time}Z`) - offset * 60_000 + 999;
}

/** The reactions in a text of OpenClaw's runtime context. Only a block of system events alone is read: there no line
 * can be what a person or a model wrote. */
export function reactionsIn(text) {
  const lines = text.split("\n").filter(Boolean);
  if (!lines.length || !lines.every((line) => line.startsWith("System: "))) return [];
  return lines.flatMap((line) => {
    const found = LINE.exec(line);
    if (!found) return [];
    const [, stamp, what, emoji, whose] = found;
    return [{ line, at: timeOf(stamp), added: what === "added", value: valueOf(emoji), emoji, about: `${emoji} ${whose}` }];
  });
}

/** What outlives one registration of the plugin; bounded. */
export function newState() {
  return { turns: new Map(), seen: new Map(), waiting: new Map(), timer: undefined, tries: 0 };
}

/** Remembers which answers were given, and brings words on them to the edge: `send(word)` resolves to one of `stored`,
 * `unknown` (the edge has no such answer), `refused`, `away` (try again). */
export class Judge {
  constructor(state, { send, now = Date.now, later = laterUnawaited }) {
    Object.assign(this, { state, send, now, later });
  }

  /** A turn that a person asked for has been answered; `target` is `{step_id}`, or `{trace_id}` for want of one. */
  answered(session, run, target) {
    const turns = (this.state.turns.get(session) ?? []).filter((turn) => turn.run !== run);
    keep(this.state.turns, session, [...turns, { run, target, at: this.now() }].slice(-TURNS), SESSIONS);
  }

  /** `/good` or `/bad`: judges the last answer of the session. Resolves to what became of it, or `nothing`. */
  async rated(session, value, comment) {
    const turn = this.turn(session, undefined);
    if (!turn) return "nothing";
    return this.post(word(turn, value, comment));
  }

  /** Texts of the runtime context of a model call: each reaction in them is a word on the answer before it, once. One
   * that is taken back before it was sent is none. */
  async noticed(session, texts) {
    const found = texts.flatMap(reactionsIn).filter(({ line }) => !this.state.seen.has(`${session}\n${line}`));
    found.forEach(({ line }) => keep(this.state.seen, `${session}\n${line}`, true, SEEN));
    const standing = new Map();
    for (const each of found) {
      standing.delete(each.about);
      if (each.added) standing.set(each.about, each);
      else this.takeBack(session, each.about);
    }
    // all targets first: while one word is sent, the next answer may come
    const words = [...standing.values()].flatMap(({ at, value, emoji, about }) => {
      const turn = value && this.turn(session, at);
      return turn ? [{ ...word(turn, value, `reaction ${emoji}`), about: `${session}\n${about}` }] : [];
    });
    const outcomes = [];
    for (const said of words) outcomes.push(await this.post(said));
    return outcomes;
  }

  turn(session, at) {
    return (this.state.turns.get(session) ?? []).findLast((turn) => at === undefined || turn.at <= at);
  }

  takeBack(session, about) {
    for (const [name, said] of this.state.waiting) {
      if (said.about === `${session}\n${about}`) this.state.waiting.delete(name);
    }
  }

  /** Sends a word, and keeps it waiting if the edge is away. The latest one on an answer counts, so an earlier one that
   * still waits is not sent after it. */
  async post(said) {
    const name = JSON.stringify(said.target);
    keep(this.state.waiting, name, said, WAITING);
    const outcome = await this.send(said);
    if (outcome === "away") this.retryLater();
    else if (this.state.waiting.get(name) === said) this.state.waiting.delete(name);
    return outcome;
  }

  retryLater() {
    if (this.state.timer !== undefined) return;
    const wait = Math.min(FIRST_RETRY_MS * 2 ** this.state.tries, LAST_RETRY_MS);
    this.state.timer = this.later(() => this.retry(), wait);
  }

  /** Sends what waits, oldest first, until the edge is away again. */
  async retry() {
    this.state.timer = undefined;
    this.state.tries += 1;
    for (const said of [...this.state.waiting.values()]) {
      if (this.state.waiting.get(JSON.stringify(said.target)) !== said) continue;
      if ((await this.post(said)) === "away") return;
      this.state.tries = 0;
    }
  }
}

/** `key` tells the edge that a word which is sent again is the same one. */
function word(turn, value, comment) {
  return { target: turn.target, value, comment: comment.slice(0, COMMENT_CHARS), key: crypto.randomUUID() };
}

function laterUnawaited(act, waitMs) {
  return setTimeout(act, waitMs).unref();
}

function keep(map, key, value, most) {
  map.delete(key);
  map.set(key, value);
  if (map.size > most) map.delete(map.keys().next().value);
}
