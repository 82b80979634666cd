"""How workers share an agent's inbox, as one script in Redis.

Reading the inbox and noting down whose turn an entry is are one step in Redis: so questions of a session stay in order,
however many workers read.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from redis import exceptions
from redis.asyncio import RedisCluster
from redis.crc import key_slot

from .backend import text_of

T = TypeVar("T")

logger = logging.getLogger(__name__)

#: `deno task docs` writes this from clients/queue.lua.
SCRIPT = """
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
"""

_SHA = hashlib.sha1(SCRIPT.encode()).hexdigest()
#: How long an answer of Redis may take, besides what a command waits itself.
_ANSWER_SECS = 5.0
#: What passes: Redis is away, starts, fails over, is full, or has no functions yet.
_PASSING = (
    exceptions.ConnectionError,
    exceptions.TimeoutError,
    exceptions.ReadOnlyError,
    exceptions.OutOfMemoryError,
    exceptions.ClusterDownError,
    exceptions.MasterDownError,
    exceptions.TryAgainError,
    exceptions.ClusterError,
    exceptions.RedisClusterException,
    asyncio.TimeoutError,
    OSError,
)
_PASSING_TEXTS = ("MISCONF ", "NOREPLICAS ", "UNBLOCKED ", "BUSY ", "Function not found", "ERR Function not found")


class Cancelled(Exception):
    """Why an answer goes no further: a stop, a newer question, another worker, or the end of this one."""


class Cancel:
    """An event, with its reason. One that is part of another is set with it."""

    def __init__(self, of: Cancel | None = None) -> None:
        self.event = asyncio.Event()
        self.reason: Exception = Cancelled()
        self._parts: list[Cancel] = []
        if of:
            of._parts.append(self)

    def set(self, reason: Exception) -> None:
        """Only the first reason counts."""
        if not self.event.is_set():
            self.reason = reason
            self.event.set()
            for part in self._parts:
                part.set(reason)

    def check(self) -> None:
        """Raises the reason, if there is one."""
        if self.event.is_set():
            raise self.reason


def fields_of(words: Any) -> dict[str, str]:
    """An entry's fields by name: redis-py makes a dict of them, or leaves the list."""
    if isinstance(words, dict):
        return {text_of(name): text_of(value) for name, value in words.items()}  # pyright: ignore
    texts = [text_of(word) for word in words]
    return dict(zip(texts[::2], texts[1::2], strict=True))


def passes(error: BaseException) -> bool:
    """Whether it may end otherwise in a moment."""
    return isinstance(error, _PASSING) or str(error).startswith(_PASSING_TEXTS)


async def pause_after(failures: int) -> None:
    """For a moment, and longer after each failure before this one: up to a second."""
    await asyncio.sleep(min(1.0, 0.05 * 2 ** min(failures, 5)))


async def persist(cancel: Cancel, once: Callable[[], Awaitable[T]]) -> T:
    """Does something until it succeeds, fails for good, or is cancelled."""
    failures = 0
    while True:
        try:
            return await once()
        except Exception as error:
            cancel.check()
            if not passes(error):
                raise
        await pause_after(failures)
        cancel.check()
        failures += 1


class Commands:
    """Sends commands over a ``redis.asyncio.Redis``, also one that a ``Sentinel`` has made, or a ``RedisCluster``."""

    def __init__(self, redis: Any) -> None:
        self._redis = redis
        self._finding: asyncio.Task[None] | None = None

    async def call(self, *words: str | int, wait: float = 0.0) -> Any:
        """What Redis answers to one command, which may wait for so long itself."""
        try:
            return await asyncio.wait_for(self._call(words), _ANSWER_SECS + wait)
        except asyncio.TimeoutError:
            # Its server may be frozen or lost. The connection is closed now, and the next one goes to the master that
            # there is; a Cluster's client looks for that when it has seen an error itself, and this was none.
            if self._finding is None and isinstance(self._redis, RedisCluster):
                self._finding = asyncio.create_task(self._find(self._redis))
            raise
        except exceptions.ReadOnlyError:
            # Another server is the master now, and nobody has closed the connections to this one.
            if pool := getattr(self._redis, "connection_pool", None):
                await pool.disconnect(inuse_connections=False)
            raise

    async def _call(self, words: tuple[str | int, ...]) -> Any:
        if self._finding:
            await asyncio.shield(self._finding)
        try:
            return await self._redis.execute_command(*words)
        except AttributeError as error:
            # redis-py stumbles over a connection that is closed while another task writes to it.
            raise exceptions.ConnectionError("the connection was closed") from error

    async def _find(self, cluster: RedisCluster) -> None:
        """Asks the servers who is the master of what."""
        try:
            await cluster.aclose()
            # A frozen one, when it is asked first, would be waited for many times; the order is another one each time.
            await asyncio.wait_for(cluster.initialize(), _ANSWER_SECS)
        except Exception as error:
            logger.info("the Cluster's masters were not found: %r", error)
        finally:
            self._finding = None


def _prefix_of(key: str) -> str:
    """The prefix of keys that lie in the slot of another key."""
    if "}" not in key:
        return f"worker:{{{key}}}"
    # The key has a tag of its own, or braces that no tag can hold: a number in the same slot takes its place.
    slot = key_slot(key.encode())
    tag = next(tag for tag in itertools.count() if key_slot(b"%d" % tag) == slot)
    return f"worker:{{{tag}}}:{key}"


class Queue:
    """The script on one inbox, for one group."""

    def __init__(self, commands: Commands, agent: str, group: str) -> None:
        self.inbox = f"agent:{agent}:inbox"
        self._commands = commands
        self._group = group
        beside = f"{_prefix_of(self.inbox)}:{group}"
        names = ("lanes", "questions", "events", "tries", "claims", "seen")
        self._keys = [self.inbox, *(f"{beside}:{name}" for name in names)]

    async def run(self, what: str, *args: str | int) -> Any:
        """One of the script's acts."""
        rest = [len(self._keys), *self._keys, what, self._group, *args]
        command = ["EVALSHA", _SHA]
        for _ in range(2):
            try:
                return await self._commands.call(*command, *rest)
            except exceptions.NoScriptError:
                command = ["EVAL", SCRIPT]
            except exceptions.ResponseError as error:
                if "NOGROUP" not in str(error):
                    raise
                await self._create_group()
        return await self._commands.call(*command, *rest)

    async def _create_group(self) -> None:
        """From the first entry on, also those from before any worker was started."""
        try:
            await self._commands.call("XGROUP", "CREATE", self.inbox, self._group, "0", "MKSTREAM")
        except exceptions.ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise

    async def entry(self, entry: str) -> dict[str, str] | None:
        """An entry's fields; None when it was trimmed away."""
        found = await self._commands.call("XRANGE", self.inbox, entry, entry)
        return fields_of(found[0][1]) if found else None
