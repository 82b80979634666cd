-- An agent's connections, for EVALSHA: who is connected is kept beside the inbox, so that an entry is written exactly
-- when that changes, whichever proxy says so and however often.
-- KEYS: the inbox (a stream), its sessions' open sockets (a hash to their number), its vacant sessions (a sorted set, by
-- when that is to be told, in ms), the connections that one proxy holds (a hash to their session), and what Redis knows
-- of that proxy (a text: its generation, "+" while not all that it holds has been told in it, and its last call); for
-- one worker of several also the sockets of each session on all of its workers (a hash to their number).
-- ARGV: what to do, MAXLEN of the inbox, and what belongs to that.
local stream, sockets, vacant, held, known, on_process = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local what, max_entries = ARGV[1], ARGV[2]

local function now_ms()
  local time = redis.call("TIME")
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Written before anything else is changed: when Redis refuses, nothing has happened.
local function add(kind, ...)
  redis.call("XADD", stream, "MAXLEN", "~", max_entries, "*", "type", kind, ...)
end

-- Connections that have opened, from ARGV[first] to ARGV[last]: connected or again, session, connection, at, sockets,
-- traceparent. All of them with one call for each key but the stream, as calls are what costs.
local function connect(first, last)
  local connections, sessions = {}, {}
  for i = first, last, 6 do
    connections[#connections + 1] = ARGV[i + 2]
    sessions[#sessions + 1] = ARGV[i + 1]
  end
  local holds, counts, here = redis.call("HMGET", held, unpack(connections)), redis.call("HMGET", sockets, unpack(sessions)), nil
  if on_process then here = redis.call("HMGET", on_process, unpack(sessions)) end
  local count_of, here_of, taken = {}, {}, {}
  local added, new_held, new_counts, new_here, back = 0, {}, {}, {}, {}
  for n, session in ipairs(sessions) do
    local connection, i = connections[n], first + 6 * (n - 1)
    if not holds[n] and not taken[connection] then
      local count = ARGV[i + 4]
      if here then
        count = (here_of[session] or tonumber(here[n] or 0)) + 1
        here_of[session] = count
      end
      if ARGV[i + 5] == "" then
        add("connected", "session", session, "connection", connection, "at", ARGV[i + 3], "sockets", count)
      else
        add("connected", "session", session, "connection", connection, "at", ARGV[i + 3], "sockets", count, "traceparent", ARGV[i + 5])
      end
      taken[connection] = true
      added = added + 1
      count_of[session] = (count_of[session] or tonumber(counts[n] or 0)) + 1
      new_held[2 * added - 1], new_held[2 * added] = connection, session
      new_counts[2 * added - 1], new_counts[2 * added] = session, count_of[session]
      if here then new_here[2 * added - 1], new_here[2 * added] = session, count end
      back[added] = session
    end
  end
  if added > 0 then
    redis.call("HSET", held, unpack(new_held))
    redis.call("HSET", sockets, unpack(new_counts))
    if here then redis.call("HSET", on_process, unpack(new_here)) end
    redis.call("ZREM", vacant, unpack(back))
  end
  return added
end

local function disconnect(connection, at, code, count, position, grace)
  local session = redis.call("HGET", held, connection)
  if not session then return 0 end
  if on_process then count = math.max(0, (tonumber(redis.call("HGET", on_process, session)) or 0) - 1) end
  if position == "" then
    add("disconnected", "session", session, "connection", connection, "at", at, "code", code, "sockets", count)
  else
    add("disconnected", "session", session, "connection", connection, "at", at, "code", code, "sockets", count, "position", position)
  end
  redis.call("HDEL", held, connection)
  if redis.call("HINCRBY", sockets, session, -1) < 1 then
    redis.call("HDEL", sockets, session)
    redis.call("ZADD", vacant, now_ms() + grace, session)
  end
  if on_process then
    if count > 0 then
      redis.call("HSET", on_process, session, count)
    else
      redis.call("HDEL", on_process, session)
    end
  end
  return 1
end

-- Its generation, whether not all has been told in it, and its last call; nothing when Redis knows nothing of it.
local function read_known()
  local text = redis.call("GET", known)
  if not text then return nil end
  local generation, anew, call = string.match(text, "^(%d+)(%+?) (%d+)$")
  return tonumber(generation), anew == "+", tonumber(call)
end

-- A proxy tells what has happened. The generation, the call's number (0 for one that may come again, and does no harm),
-- "begin", "end" or both for what it tells first and last in a generation, the grace in ms; then six words for each event:
--   connected, session, connection, at, sockets, traceparent
--   again, the same: it has left since, and is told only if Redis knew nothing of the proxy
--   disconnected, connection, at, code, sockets, position
-- Returns how many entries were written, and 0 if Redis knew nothing of the proxy, though it had begun.
if what == "tell" then
  local generation, call, part, grace = tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5], ARGV[6]
  local current, anew, last = read_known()
  local is_known = current ~= nil
  if string.find(part, "begin", 1, true) and (not current or current < generation) then
    anew = anew or not current
    current, is_known, last = generation, true, last or 0
  elseif call > 0 and current and call <= last then
    return { 0, 1 }
  end
  -- Before the entries, so that Redis refuses both or neither when it is full.
  if is_known then
    local stays = anew and not (string.find(part, "end", 1, true) and current == generation)
    redis.call("SET", known, current .. (stays and "+" or "") .. " " .. math.max(call, last))
  end
  local added, i = 0, 7
  while i < #ARGV do
    if ARGV[i] == "disconnected" then
      added = added + disconnect(ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4], ARGV[i + 5], grace)
      i = i + 6
    else
      -- As many of a kind as follow each other.
      local kind, first = ARGV[i], i
      repeat i = i + 6 until ARGV[i] ~= kind
      if kind == "connected" or anew then added = added + connect(first, i - 1) end
    end
  end
  return { added, is_known and 1 or 0 }
end

-- Others end connections of a proxy that is dead: its generation, the grace in ms, when, and then the connections.
-- Returns how many were; -1 when the proxy has begun a newer generation, and lives.
if what == "bury" then
  local generation, grace, at = tonumber(ARGV[3]), ARGV[4], ARGV[5]
  local current = read_known()
  if current and current > generation then return -1 end
  local added = 0
  for i = 6, #ARGV do added = added + disconnect(ARGV[i], at, "1006", "0", "", grace) end
  return added
end

-- All of them have been ended: the generation, and how long a proxy that was not dead may still speak of them, in ms.
if what == "buried" then
  local generation = tonumber(ARGV[3])
  local current, _, last = read_known()
  if not current or current <= generation then
    redis.call("SET", known, (current or generation) .. " " .. (last or 0), "PX", ARGV[4])
  end
  return 1
end

-- The most sessions to tell of. Returns how many were, and the ms until the next one is due; -1 for none.
if what == "vacated" then
  local now = now_ms()
  local due = redis.call("ZRANGEBYSCORE", vacant, "-inf", now, "LIMIT", 0, ARGV[3])
  for _, session in ipairs(due) do
    add("vacated", "session", session, "connection", "", "at", now)
    redis.call("ZREM", vacant, session)
  end
  local next = redis.call("ZRANGE", vacant, 0, 0, "WITHSCORES")
  return { #due, next[2] and math.max(0, next[2] - now) or -1 }
end

-- Deletes an inbox into which nothing was written for so many ms, and which no group reads. Returns the ms after which
-- that is to be tried again; -1 for never, as it is gone, or sessions or a consumer group use it.
if what == "expire" then
  if redis.call("EXISTS", stream) == 0 or redis.call("EXISTS", sockets, vacant) > 0 then return -1 end
  if #redis.call("XINFO", "GROUPS", stream) > 0 then return -1 end
  local newest = redis.call("XREVRANGE", stream, "+", "-", "COUNT", 1)[1]
  local left = newest and string.match(newest[1], "^%d+") + ARGV[3] - now_ms() or 0
  if left > 0 then return left end
  redis.call("DEL", stream)
  return -1
end

return redis.error_reply("ERR unknown: " .. what)
