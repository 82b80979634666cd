// @ts-check
/**
 * How workers share an agent's inbox, as one script in Redis and the commands of whichever client library is there.
 *
 * @module
 */

/**
 * Reading the inbox and noting down whose turn an entry is are one step in Redis: so questions of a session stay in
 * order, however many workers read. `deno task docs` writes the text from clients/queue.lua.
 */
export const script = `
-- How workers share an agent's inbox. Entries wait in lanes, one for the questions of each session ("m <session>") and
-- one for its events ("e <session>"); a lane is held by one worker at a time, for as long as a lease.
-- KEYS: the inbox; lanes (a hash to "<holder or -> <id> <id> ..."; "!" before an id: what came before it was dropped, and
-- the log does not say so yet); lanes with questions and lanes with events (sorted sets, by when they may be taken, in
-- ms); how often an entry was taken (a hash); claims (a hash, of connections and of questions); what clients have sent
-- lately (a sorted set of session and id, by when).
local inbox, lanes, questions, events, tries, claims, seen = unpack(KEYS)
local what, group = ARGV[1], ARGV[2]

local time = redis.call("TIME")
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function due_of(lane)
  return lane:sub(1, 1) == "m" and questions or events
end

local function read(lane)
  local text, ids = redis.call("HGET", lanes, lane), {}
  for word in (text or ""):gmatch("%S+") do ids[#ids + 1] = word end
  return table.remove(ids, 1), ids
end

local function write(lane, holder, ids, due)
  if #ids == 0 then
    redis.call("HDEL", lanes, lane)
    redis.call("ZREM", due_of(lane), lane)
  else
    redis.call("HSET", lanes, lane, holder .. " " .. table.concat(ids, " "))
    if due then redis.call("ZADD", due_of(lane), due, lane) end
  end
end

local function bare(id)
  return (id:gsub("^!", ""))
end

local function done(id)
  id = bare(id)
  redis.call("XACK", inbox, group, id)
  redis.call("HDEL", tries, id)
  redis.call("HDEL", claims, id)
end

local function is_before(a, b)
  local a_ms, a_n = bare(a):match("^(%d+)-(%d+)$")
  local b_ms, b_n = b:match("^(%d+)-(%d+)$")
  return a_ms + 0 < b_ms + 0 or (a_ms == b_ms and a_n + 0 < b_n + 0)
end

-- An entry of the inbox goes into its lane. Returns the lane, if others wait there before it.
local function enter(id, words)
  local entry = {}
  for i = 1, #words, 2 do entry[words[i]] = words[i + 1] end
  local kind, session, connection = entry.type, entry.session, "c" .. (entry.connection or "")
  if not kind or not session then return done(id) end
  if kind == "connected" and entry.claims then redis.call("HSET", claims, connection, entry.claims) end
  if kind == "disconnected" then redis.call("HDEL", claims, connection) end
  if kind == "message" then
    if entry.id and redis.call("ZADD", seen, "NX", now, session .. " " .. entry.id) == 0 then return done(id) end
    -- One that was posted has no connection, and says itself whose it is.
    local known = entry.claims or redis.call("HGET", claims, connection)
    if known then redis.call("HSET", claims, id, known) end
  end
  local lane = (kind == "message" and "m " or "e ") .. session
  local holder, ids = read(lane)
  ids[#ids + 1] = id
  write(lane, holder or "-", ids, not holder and now)
  return #ids > 1 and kind == "message" and lane
end

-- The holder's name, the lease in ms, how many entries to read, how many questions and events to take, for how many ms to
-- remember what was sent. Returns what has entered a lane behind others, what was taken, whether there is more to read,
-- and the last entry's id.
if what == "take" then
  local holder, lease, count, remember_ms = ARGV[3], ARGV[4], tonumber(ARGV[5]), ARGV[8]
  local reply = redis.call("XREADGROUP", "GROUP", group, "workers", "COUNT", count, "STREAMS", inbox, ">")
  local entries, behind, taken = reply and reply[1][2] or {}, {}, {}
  for _, entry in ipairs(entries) do
    local lane = enter(entry[1], entry[2])
    if lane then behind[#behind + 1] = { lane, entry[1], entry[2] } end
  end
  if #entries > 0 then redis.call("ZREMRANGEBYSCORE", seen, "-inf", now - remember_ms) end
  for i, due in ipairs({ questions, events }) do
    for _, lane in ipairs(redis.call("ZRANGEBYSCORE", due, "-inf", now, "LIMIT", 0, ARGV[5 + i])) do
      local _, ids = read(lane)
      local entry
      while ids[1] and not entry do
        entry = redis.call("XRANGE", inbox, bare(ids[1]), bare(ids[1]))[1]
        -- It was trimmed away.
        if not entry then done(table.remove(ids, 1)) end
      end
      write(lane, holder, ids, now + lease)
      if entry then
        local count = ids[1] == entry[1] and redis.call("HINCRBY", tries, entry[1], 1) or 0
        taken[#taken + 1] = { lane, ids[1], count, redis.call("HGET", claims, entry[1]) or "", entry[2], table.concat(ids, " ", 2) }
      end
    end
  end
  local last = redis.call("XREVRANGE", inbox, "+", "-", "COUNT", 1)[1]
  return { behind, taken, #entries == count and 1 or 0, last and last[1] or "0-0" }
end

-- The lease in ms, then lanes and their holders. Returns for each the ids behind the first; nothing for a lane that was lost.
if what == "renew" then
  local answer = {}
  for i = 4, #ARGV, 2 do
    local holder, ids = read(ARGV[i])
    local held = holder == ARGV[i + 1]
    if held then redis.call("ZADD", due_of(ARGV[i]), now + ARGV[3], ARGV[i]) end
    answer[#answer + 1] = held and table.concat(ids, " ", 2)
  end
  return answer
end

local lane, token = ARGV[3], ARGV[4]
local holder, ids = read(lane)

-- Lane, holder: its first entry is done.
if what == "finish" then
  if holder ~= token then return 0 end
  done(table.remove(ids, 1))
  write(lane, "-", ids, now)
  return 1
end

-- Lane, holder, in how many ms it may be taken, whether this time counts.
if what == "release" then
  if holder ~= token then return 0 end
  if ARGV[6] == "0" and ids[1] == bare(ids[1]) then redis.call("HINCRBY", tries, ids[1], -1) end
  ids[1] = bare(ids[1])
  write(lane, "-", ids, now + ARGV[5])
  return 1
end

-- Lane, holder to be, lease in ms, id: what came before that entry is done. Returns whether anything was; the same holder
-- may ask again.
if what == "interrupt" then
  local id, dropped = ARGV[6], holder == token
  while ids[1] and is_before(ids[1], id) do
    dropped = true
    done(table.remove(ids, 1))
  end
  if not dropped then return 0 end
  if ids[1] == id then ids[1] = "!" .. id end
  write(lane, token, ids, now + ARGV[5])
  return 1
end

return redis.error_reply("ERR unknown: " .. what)
`;

/** How long an answer of Redis may take, besides what a command waits itself. */
const answerMs = 5000;

/**
 * What we need of a client library.
 * @typedef {{ call?: (command: string, ...args: string[]) => unknown, sendCommand?: (...args: any[]) => unknown,
 *   duplicate: (...args: any[]) => any, connect?: () => Promise<unknown>, disconnect?: () => unknown, destroy?: () => unknown,
 *   isCluster?: boolean, status?: string, on?: (event: string, listener: (error: Error) => void) => unknown }} Client
 */

/**
 * Sends commands over a connection of its own, made as that of a client of ioredis or node-redis is: to one server, to the
 * master that sentinels name, or to a Cluster. One that does not answer is replaced: its server may be frozen or lost, and
 * another one the master, which a library does not always find out by itself.
 */
export class Commands {
  /** @type {Connection | undefined} */
  #connection;

  /** @param {Client} client */
  constructor(client) {
    this.client = client;
  }

  /**
   * @param {string} key which server it is for, in a Cluster
   * @param {readonly (string | number)[]} words
   * @returns {Promise<any>}
   */
  async call(key, words, waitMs = 0) {
    const connection = this.#connection ??= new Connection(this.client);
    const limitMs = answerMs + waitMs;
    let timer;
    const late = new Promise((_, reject) => {
      timer = setTimeout(() => {
        connection.end();
        reject(new Error(`Redis has not answered within ${limitMs} ms`));
      }, limitMs);
    });
    try {
      return await Promise.race([connection.send(key, words.map(String)), late]);
    } catch (error) {
      // Another server is the master now, and nobody has closed the connection to this one.
      if (error instanceof Error && /^(READONLY|MASTERDOWN|UNBLOCKED) /.test(error.message)) connection.end();
      if (!(error instanceof TypeError)) throw error;
      // node-redis stumbles over a server that has gone while it sends: the words are texts, so no TypeError is of them.
      connection.end();
      throw new Error("the connection was lost", { cause: error });
    } finally {
      clearTimeout(timer);
      if (this.#connection === connection && connection.hasEnded) this.#connection = undefined;
    }
  }

  /** What is under way fails. A later command makes another connection. */
  end() {
    this.#connection?.end();
    this.#connection = undefined;
  }
}

/** Another client of its kind. */
class Connection {
  #client;
  #opened;
  #ended = false;

  /** Without what a program has set for its own commands. @param {Client} client */
  constructor(client) {
    const own = { commandOptions: {}, commandTimeout: undefined, keyPrefix: "" };
    /** @type {Client} */
    const another = client.isCluster ? client.duplicate([], own) : client.duplicate(own);
    // What is wrong is told by the command that fails.
    another.on?.("error", () => {});
    this.#client = another;
    this.#opened = this.#open();
    this.#opened.catch(() => {});
  }

  /** It comes back no more. */
  get hasEnded() {
    return this.#ended || this.#client.status === "end";
  }

  /** ioredis opens its own by itself. */
  async #open() {
    if (this.#client.call) return;
    try {
      await this.#client.connect?.();
    } catch (error) {
      this.end();
      throw error;
    }
  }

  /** @param {string} key @param {string[]} words @returns {Promise<unknown>} */
  async send(key, words) {
    await this.#opened;
    const client = this.#client;
    const [name = "", ...args] = words;
    if (client.call) return client.call(name, ...args);
    if ("masters" in client) return client.sendCommand?.(key, false, words);
    return "getMasterNode" in client ? client.sendCommand?.(false, words) : client.sendCommand?.(words);
  }

  end() {
    if (this.#ended) return;
    this.#ended = true;
    try {
      const ending = this.#client.call ? this.#client.disconnect?.() : this.#client.destroy?.();
      Promise.resolve(ending).catch(() => {});
    } catch {
      // It was not open.
    }
  }
}

/** What passes: Redis is away, starts, fails over, is full, or has no functions yet. Everything but an error of Redis's own. @param {unknown} error */
export function passes(error) {
  const text = error instanceof Error ? error.message : String(error);
  if (
    /^(LOADING|READONLY|MASTERDOWN|CLUSTERDOWN|TRYAGAIN|NOREPLICAS|OOM|MISCONF|BUSY|UNBLOCKED|MOVED|ASK|EXECABORT) /
      .test(text)
  ) {
    return true;
  }
  return /^ERR Function not found/.test(text) || !/^-?[A-Z]{2,} /.test(text) && !(error instanceof TypeError);
}

/** For a moment, and longer after each failure before this one: up to a second. @param {number} failures @returns {Promise<void>} */
export function pauseAfter(failures) {
  return new Promise((resolve) => setTimeout(resolve, Math.min(1000, 50 * 2 ** failures)));
}

/** Does something until it succeeds, fails for good, or is cancelled. @template T @param {AbortSignal} signal @param {() => Promise<T>} once @returns {Promise<T>} */
export async function persist(signal, once) {
  for (let failures = 0;; failures++) {
    try {
      return await once();
    } catch (error) {
      signal.throwIfAborted();
      if (!passes(error)) throw error;
      await pauseAfter(failures);
      signal.throwIfAborted();
    }
  }
}

/** The entries' fields by name. @param {readonly string[]} words @returns {Record<string, string>} */
export function fieldsOf(words) {
  /** @type {Record<string, string>} */
  const fields = {};
  for (let i = 0; i < words.length; i += 2) fields[words[i] ?? ""] = words[i + 1] ?? "";
  return fields;
}

/** The prefix of keys that lie in the slot of another key. @param {string} key */
function prefixOf(key) {
  if (!key.includes("}")) return `worker:{${key}}`;
  // The key has a tag of its own, or braces that no tag can hold: a number in the same slot takes its place.
  const slot = slotOf(key);
  let tag = 0;
  while (slotOf(String(tag)) !== slot) tag++;
  return `worker:{${tag}}:${key}`;
}

/** The hash slot of a key in a Cluster: CRC16 (XMODEM) of its tag, or of all of it. @param {string} key */
function slotOf(key) {
  const [, tag = key] = /^[^{]*\{([^}]+)\}/.exec(key) ?? [];
  let crc = 0;
  for (const byte of new TextEncoder().encode(tag)) {
    crc ^= byte << 8;
    for (let bit = 0; bit < 8; bit++) crc = (crc << 1 ^ (crc & 0x8000 ? 0x1021 : 0)) & 0xffff;
  }
  return crc & 0x3fff;
}

/** The script on one inbox, for one group. */
export class Queue {
  #commands;
  #group;
  #sha = "";

  /** @param {Commands} commands @param {string} agent @param {string} group */
  constructor(commands, agent, group) {
    this.#commands = commands;
    this.inbox = `agent:${agent}:inbox`;
    this.#group = group;
    const beside = `${prefixOf(this.inbox)}:${group}`;
    const names = ["lanes", "questions", "events", "tries", "claims", "seen"];
    /** Those of the script: all in one slot. */
    this.keys = [this.inbox, ...names.map((name) => `${beside}:${name}`)];
  }

  /** @param {"take" | "renew" | "finish" | "release" | "interrupt"} what @param {...(string | number)} args @returns {Promise<any>} */
  async run(what, ...args) {
    const rest = [this.keys.length, ...this.keys, what, this.#group, ...args];
    this.#sha ||= await sha1(script);
    let command = ["EVALSHA", this.#sha];
    for (let attempt = 1;; attempt++) {
      try {
        return await this.#commands.call(this.inbox, [...command, ...rest]);
      } catch (error) {
        const text = error instanceof Error ? error.message : "";
        if (attempt < 3 && text.includes("NOSCRIPT")) command = ["EVAL", script];
        else if (attempt < 3 && text.includes("NOGROUP")) await this.#createGroup();
        else throw error;
      }
    }
  }

  /** From the first entry on, also those from before any worker was started. */
  async #createGroup() {
    try {
      await this.#commands.call(this.inbox, ["XGROUP", "CREATE", this.inbox, this.#group, "0", "MKSTREAM"]);
    } catch (error) {
      if (!/** @type {Error} */ (error).message.startsWith("BUSYGROUP")) throw error;
    }
  }

  /** An entry's fields; undefined when it was trimmed away. @param {string} id */
  async entry(id) {
    const [entry] = await this.#commands.call(this.inbox, ["XRANGE", this.inbox, id, id]);
    return entry && fieldsOf(entry[1]);
  }
}

/** @param {string} text */
async function sha1(text) {
  const hash = await crypto.subtle.digest("SHA-1", new TextEncoder().encode(text));
  return [...new Uint8Array(hash)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
