/** The users of tests/torture/chat.ts, each with an oracle, which compares what stands at the screen with what the model says. */

import assert from "node:assert/strict";
import type { UIMessage } from "ai";
import type { Relay } from "../harness/relay.ts";
import { partsExpected, partsOf } from "./chat_model.ts";
import { oneOf, pause } from "./parts.ts";

/** What may be wrong with a question's answer at the screen. */
export const kinds = ["error", "stuck", "unanswered", "wrong text", "doubled", "not in the other tab"] as const;
/** One of them. */
export type Kind = typeof kinds[number];

/** What was asked is lost with Redis: the page shows an error, or a question without an answer, and so a way to ask again. */
export const losable: readonly Kind[] = ["error", "unanswered"];

/** A question, as its user knows of it. */
interface Asked {
  readonly id: string;
  readonly text: string;
  stopped: boolean;
  /** Its page was left before it was answered, so it may never have arrived. */
  optional: boolean;
  readonly troubles: Set<Kind>;
}

/** What a tab shows, and what the history has in the same form. */
export interface Screen {
  /** `ready`, `submitted`, `streaming`, `error`, or whatever else the user waits for the end of. */
  readonly status: string;
  readonly messages: readonly UIMessage[];
  readonly error?: unknown;
}

/** A page: one tab of a user's browser. */
export interface Tab {
  look(): Screen | Promise<Screen>;
  ask(question: Pick<Asked, "id" | "text">): unknown;
  /** Asks the last question anew, or the one of this id; returns false where the page does not offer it any more. */
  askAgain(id?: string): boolean | Promise<boolean>;
  /** The button. */
  stop(): unknown;
  /** Its browser says that there is no network. */
  goOffline?(offline: boolean): unknown;
  /** Loads the page anew. */
  reload(): Tab | Promise<Tab>;
  /** Nothing of it goes on. */
  leave(): unknown;
}

/** The database of the agents. */
export interface Store {
  /** The messages of a session, in the form in which a page shows them. */
  of(session: string): { readonly messages: readonly UIMessage[] };
  /** Messages behind a question that was asked anew. */
  readonly dropped: ReadonlySet<string>;
}

/** One way to have chats. */
export interface System {
  /** How long a user waits for what is to become right, in ms. */
  readonly patienceMs: number;
  /** Time between two looks at a page, in ms. */
  readonly lookMs: number;
  /** Opens a page, in the place of a user's tab. */
  open(user: User, i: number): Tab | Promise<Tab>;
  /** What a page shows of the answer to a question: {@linkcode partsExpected}, unless it shows less. */
  expected(question: string): readonly string[];
}

/** What befalls all users. */
export interface Weather {
  /** So many users wait for something with which nothing else is to interfere. */
  waiting: number;
}

/** The same for troubles that are counted, and end nothing. */
const countedMs = 10_000;

/** What is wrong with the answer to a question, among the messages of a page. */
export function troubleOf(
  messages: readonly UIMessage[],
  { id, text, stopped }: Omit<Asked, "troubles" | "optional">,
  expected: readonly string[] = partsExpected(text),
): Kind | undefined {
  const at = messages.findIndex((message) => message.id === id);
  if (at < 0) return "unanswered";
  const rest = messages.slice(at + 1);
  const end = rest.findIndex(({ role }) => role === "user");
  const answers = end < 0 ? rest : rest.slice(0, end);
  if (answers.length === 0) return stopped ? undefined : "unanswered";
  const actual = answers.flatMap(partsOf);
  const words = actual.flatMap((part) => part.split(" ").slice(1)).filter((word) => word !== "");
  if (answers.length > 1 || new Set(words).size < words.length) return "doubled";
  const isLast = (i: number) => stopped && i === actual.length - 1;
  const isRight = actual.every((part, i) => part === expected[i] || (isLast(i) && expected[i]?.startsWith(part)));
  if (isRight && (stopped || actual.length === expected.length)) return undefined;
  return "wrong text";
}

/** A user, with one page or two, and a network of its own. */
export class User implements AsyncDisposable {
  readonly asked: Asked[] = [];
  readonly tabs: Tab[] = [];
  reloads = 0;
  resumed = 0;
  regenerated = 0;
  /** Questions that were asked once more, as a page had found them without an answer. */
  impatient = 0;
  /** Answers that were there only when nothing was harmed any more. */
  late = 0;
  /** Of its chat. */
  session: string;

  constructor(
    readonly id: string,
    readonly system: System,
    readonly store: Store,
    readonly random: () => number,
    readonly relay: Relay,
    /** Troubles that are counted, and end nothing. */
    readonly counted: readonly Kind[],
    readonly weather: Weather,
  ) {
    this.session = id;
  }

  /** What the history has. */
  get #stored(): readonly UIMessage[] {
    return this.store.of(this.session).messages;
  }

  async #open(i: number): Promise<void> {
    this.tabs[i] = await this.system.open(this, i);
  }

  /** The tab is loaded again. */
  async reload(tab: Tab): Promise<Tab> {
    this.reloads++;
    return this.tabs[this.tabs.indexOf(tab)] = await tab.reload();
  }

  async run(until: () => boolean): Promise<void> {
    await this.#open(0);
    while (!until()) {
      if (this.tabs.length === 1 && this.random() < 0.2) await this.#open(1);
      else if (this.tabs.length === 2 && this.random() < 0.1) await this.tabs.pop()!.leave();
      await pause(200 * this.random());
      await this.turn(oneOf(this.tabs, this.random));
    }
  }

  /** Asks, or asks again; something may come between; in the end the answer is there. */
  async turn(tab: Tab): Promise<void> {
    // There is no button until then.
    const sinceMs = performance.now();
    let screen = await tab.look();
    while (/submitted|streaming/.test(screen.status) && performance.now() - sinceMs < this.#patienceMs("stuck")) {
      await pause(this.system.lookMs);
      screen = await tab.look();
    }
    const last = this.asked.at(-1);
    const again = this.random() < 0.15;
    let asked: Asked;
    let former = false;
    const isRight = last && !last.optional && !this.#troubleOf(screen.messages, last) && screen.status === "ready";
    if (isRight && again && await tab.askAgain()) {
      asked = last;
      former = asked.stopped;
      asked.stopped = false;
      this.regenerated++;
    } else {
      const id = `${this.id}-${this.asked.length}`;
      asked = { id, text: `q-${id}`, stopped: false, optional: false, troubles: new Set() };
      this.asked.push(asked);
      await tab.ask(asked);
    }
    await pause(800 * this.random() ** 2);
    switch (oneOf(["", "", "stop", "reload", "reload", "offline", "stall", "cut", "tear", "impatient"], this.random)) {
      case "stop":
        asked.stopped = true;
        await tab.stop();
        break;
      case "reload":
        tab = await this.#reloadBefore(asked, former, tab);
        break;
      case "impatient": {
        const other = this.tabs.find((each) => each !== tab);
        tab = other ?? await this.#reloadBefore(asked, former, tab);
        for (let looks = 0; looks < 20; looks++) {
          const { status, messages } = await tab.look();
          if (status === "ready" && messages.at(-1)?.id === asked.id && await tab.askAgain()) {
            asked.stopped = asked.optional = false;
            this.impatient++;
            break;
          }
          await pause(this.system.lookMs);
        }
        break;
      }
      case "offline":
        await this.#goOffline(true);
        await pause(1500 * this.random());
        await this.#goOffline(false);
        break;
      case "stall":
        this.relay.freezeAll();
        await pause(1000 * this.random());
        if (this.random() < 0.5) this.relay.thawAll();
        else this.relay.cut();
        break;
      case "tear":
        // The next connections end at any byte.
        this.relay.budgets = Array.from({ length: 2 }, () => ({ down: 1 + Math.floor(2000 * this.random()) }));
        this.relay.cut();
        break;
      case "cut":
        this.relay.cut();
    }
    await this.see(tab, asked);
  }

  /** The tab is loaded again; the question may never have left it. */
  async #reloadBefore(asked: Asked, former: boolean, tab: Tab): Promise<Tab> {
    if ((await tab.look()).status === "submitted") {
      asked.optional = true;
      // What was there before stays if this was never heard.
      asked.stopped = former;
    }
    return await this.reload(tab);
  }

  async #goOffline(offline: boolean): Promise<void> {
    this.relay.hangsUp = offline;
    if (offline) this.relay.cut();
    for (const tab of this.tabs) await tab.goOffline?.(offline);
  }

  #troubleOf(messages: readonly UIMessage[], asked: Asked): Kind | undefined {
    return troubleOf(messages, asked, this.system.expected(asked.text));
  }

  /** What is wrong with a question in a tab, that is to become right by itself. */
  async #lacks(tab: Tab, asked: Asked): Promise<Kind | undefined> {
    const { status, messages } = await tab.look();
    if (status === "error") return "error";
    if (status !== "ready") return "stuck";
    return this.#troubleOf(messages, asked);
  }

  /**
   * What is wrong in the end, after a wait until nothing is, or what ends the wait. A busy machine may recover more slowly
   * than it is harmed: what lasts is waited for once more, and nothing is harmed meanwhile.
   */
  async #settled(tab: Tab, asked: Asked, ends: (lack: Kind) => boolean, sinceMs?: number): Promise<Kind | undefined> {
    let lack: Kind | undefined;
    const isSettled = () => lack === undefined || ends(lack);
    const wait = async (sinceMs = performance.now()) => {
      lack = await this.#lacks(tab, asked);
      while (!isSettled() && performance.now() - sinceMs < this.#patienceMs(lack)) {
        await pause(this.system.lookMs);
        lack = await this.#lacks(tab, asked);
      }
    };
    await wait(sinceMs);
    if (isSettled() || this.#lets(lack!)) return lack;
    this.weather.waiting++;
    await wait();
    this.weather.waiting--;
    if (isSettled()) this.late++;
    return lack;
  }

  /** Waits until the answer is there; as long as there is none, the user asks again. */
  async see(tab: Tab, asked: Asked): Promise<void> {
    for (let tries = 0; tries < 3; tries++) {
      let lack = await this.#settled(
        tab,
        asked,
        (lack) => lack === "error" || (asked.optional && lack === "unanswered"),
      );
      if (lack === undefined || (asked.optional && lack === "unanswered")) return;
      await this.#note(lack, tab, asked);
      if (lack !== "error" || this.random() < 0.5) {
        tab = await this.reload(tab);
        await pause(200);
        lack = await this.#lacks(tab, asked);
        // What is under way is waited for.
        if (lack === undefined || lack === "stuck") continue;
      }
      asked.stopped = false;
      const { messages } = await tab.look();
      if (messages.some(({ id }) => id === asked.id)) await tab.askAgain(asked.id);
      else await tab.ask(asked);
      // The error is there until the chat has begun to ask.
      await pause(0);
    }
  }

  /** Counts a trouble, or ends the torture with it. */
  async #note(kind: Kind, tab: Tab, asked: Asked, where = ""): Promise<void> {
    asked.troubles.add(kind);
    if (!this.#lets(kind)) throw new Error(`${where}${kind}: ${await this.tell(tab, asked)}`);
  }

  /** All that is known of a question. */
  async tell(tab: Tab, asked: Asked): Promise<string> {
    const of = (messages: readonly UIMessage[]) => {
      const at = messages.findIndex(({ id }) => id === asked.id);
      return (at < 0 ? messages.slice(-4) : messages.slice(at)).map((message) => [message.id, ...partsOf(message)]);
    };
    const { status, error, messages } = await tab.look();
    return JSON.stringify({
      ...{ user: this.id, session: this.session, ...asked, troubles: [...asked.troubles] },
      ...{ tab: this.tabs.indexOf(tab), status, error: `${error}`, shown: of(messages), stored: of(this.#stored) },
      expected: this.system.expected(asked.text),
    });
  }

  /** What is wrong in the end, with all that the history has, in each tab, and when it is loaded again. */
  async judge(): Promise<void> {
    await this.#judge("in the end");
    if (this.counted === kinds) return;
    for (const tab of [...this.tabs]) await this.reload(tab);
    await this.#judge("when loaded again");
  }

  async #judge(when: string): Promise<void> {
    const isCounting = this.counted === kinds;
    if (!isCounting) await this.#eventually(() => this.#compareQuestions(when));
    const stored = new Set(this.#stored.map(({ id }) => id));
    const sinceMs = performance.now();
    // The last one to be asked anew has dropped what came after its question.
    for (const asked of this.asked) {
      if (!stored.has(asked.id)) continue;
      const trouble = () => this.#troubleOf(this.#stored, asked);
      for (const tab of this.tabs) {
        // What its user has left unanswered.
        const isLeft = (lack: Kind) => lack === trouble() && !isCounting && this.#lets(lack);
        const lack = await this.#settled(tab, asked, isLeft, isCounting ? sinceMs : undefined);
        if (lack === undefined || isLeft(lack)) continue;
        const isMissing = lack === "unanswered" && !trouble();
        await this.#note(isMissing ? "not in the other tab" : lack, tab, asked, `${when} `);
      }
      await this.#eventually(async () => {
        const lack = trouble();
        if (lack && !this.#lets(lack)) {
          throw new Error(`in the history ${lack}: ${await this.tell(this.tabs[0]!, asked)}`);
        }
      });
    }
    if (isCounting) return;
    // An agent does not begin what was stopped before.
    const { dropped } = this.store;
    const missing = this.asked.filter(({ id, optional, stopped, troubles }) =>
      !optional && !stopped && !stored.has(id) && !dropped.has(id) && troubles.size === 0
    );
    assert.deepEqual(missing, [], "questions that no agent has seen");
  }

  /** What is asked may come into the history only now, if its page was left. */
  async #compareQuestions(when: string): Promise<void> {
    const asked = this.#stored.filter(({ role }) => role === "user").map(({ id }) => id);
    for (const tab of this.tabs) {
      const { messages } = await tab.look();
      const shown = messages.filter(({ id, role }) => role === "user" && asked.includes(id)).map(({ id }) => id);
      assert.deepEqual(shown, asked, `${when} the questions of a page`);
    }
  }

  /** Waits until a check passes. @throws what it throws in the end. */
  async #eventually(check: () => Promise<void>): Promise<void> {
    const sinceMs = performance.now();
    while (true) {
      try {
        return await check();
      } catch (error) {
        if (performance.now() - sinceMs > this.system.patienceMs) throw error;
      }
      await pause(this.system.lookMs);
    }
  }

  #lets(kind: Kind): boolean {
    return this.counted.includes(kind);
  }

  #patienceMs(lack?: Kind): number {
    return lack && this.#lets(lack) ? countedMs : this.system.patienceMs;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const tab of this.tabs) await tab.leave();
    this.relay[Symbol.dispose]();
  }
}
