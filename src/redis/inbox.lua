-- An agent's connections, for EVALSHA: those that are open are kept beside the inbox, so that an entry is written exactly
-- when that changes, whichever proxy says so and however often.
--
-- Redis may lose any of these keys, as when it evicts them. Each call sees whether those are there that should be. When
-- one is not, a new epoch begins: the number of open sockets is counted anew, what is told is refused until its proxy
-- has told all that it holds again, and no session is told vacant before each living proxy has had the time to.
--
-- KEYS: the inbox (a stream), its sessions' open sockets (a hash to their number, and for each process of several
-- workers those on all of them), its vacant sessions (a sorted set, by when that is to be told, in ms), the connections
-- that one proxy holds (a hash to their session, and the epoch in which they were counted), what Redis knows of that
-- proxy (a text: its generation, with how much is to be told in it; its last call; the epoch; whether it holds any),
-- and the epoch (a text: its name; until when nothing is told vacant; how many of sockets and vacant there are).
-- ARGV: what to do, MAXLEN of the inbox, and what belongs to that.
local stream, sockets, vacant, held, known, epoch_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local what, max_entries = ARGV[1], ARGV[2]
-- One worker of several: the process's name, before its own.
local process = string.match(held, ":held:([^:.]+)%.[^:.]+$")

local asked_ms
local function now_ms()
  if not asked_ms then
    local time = redis.call("TIME")
    asked_ms = time[1] * 1000 + math.floor(time[2] / 1000)
  end
  return asked_ms
end

-- Within so many ms each living proxy sees that an epoch has begun, and has told what it holds.
local settle_ms = 15000

-- Written before anything else is changed: when Redis refuses, nothing has happened.
local newest = ""
local function add(kind, ...)
  newest = redis.call("XADD", stream, "MAXLEN", "~", max_entries, "*", "type", kind, ...)
end

-- The epoch, as it was read, and which keys of all proxies are there: 1 for sockets, and 2 for vacant; nil when that may
-- have changed.
local epoch, settled_at, shared, epoch_text
-- The proxy's generation, how much is to be told in it (see "begin"), its last call, in which epoch it was told last,
-- and whether it holds any connections; the first is nil when Redis knows nothing of it.
local current, mode, last, told_in, holds

local function exist(...) return redis.call("EXISTS", ...) end

-- Reads all that, and begins an epoch if there is none, or something has been lost. `had_told` says that the proxy has
-- told something of the agent, `has_begun` that it has begun to.
local function look(grace, had_told, has_begun)
  epoch_text = redis.call("GET", epoch_key)
  if epoch_text then
    epoch, settled_at, shared = string.match(epoch_text, "^(%d+) (%d+) (%d)$")
    settled_at, shared = tonumber(settled_at), tonumber(shared)
  end
  local text = redis.call("GET", known)
  if text then
    current, mode, last, told_in, holds = string.match(text, "^(%d+)([-+0b]?) (%d+) (%d*) (%d)$")
    current, last, holds = tonumber(current), tonumber(last), holds == "1"
  end
  local is_lost
  if epoch then
    -- Whether its sockets are counted is not known when it should hold some, or may, and holds none.
    local expected = shared == 3 and 2 or math.min(shared, 1)
    if told_in == epoch and holds or had_told and not current then
      is_lost = exist(sockets, vacant, held) ~= expected + 1
    else
      is_lost = exist(sockets, vacant) ~= expected
    end
  else
    is_lost = exist(sockets, vacant) > 0 or holds or ((had_told or has_begun) and not current)
  end
  if epoch and not is_lost then return end
  local now = now_ms()
  settled_at = is_lost and now + settle_ms or 0
  epoch = string.format("%.0f", math.max(now, (tonumber(epoch) or 0) + 1))
  shared = nil
  if is_lost then
    -- A session that no proxy speaks of any more has been left.
    local all, sessions = redis.call("HGETALL", sockets), {}
    for i = 1, #all, 2 do
      if not string.find(all[i], "\n", 1, true) then
        sessions[#sessions + 1] = now + (grace or 0)
        sessions[#sessions + 1] = all[i]
      end
      if #sessions == 1000 or (i == #all - 1 and #sessions > 0) then
        redis.call("ZADD", vacant, "NX", unpack(sessions))
        sessions = {}
      end
    end
    redis.call("DEL", sockets)
  end
end

-- What the next call is to find.
local function keep()
  if not shared then shared = exist(sockets) + 2 * exist(vacant) end
  local text = string.format("%s %.0f %d", epoch, settled_at, shared)
  if text ~= epoch_text then redis.call("SET", epoch_key, text) end
end

local function counted(session) return session .. "\n" .. epoch end

-- The session of a connection that is held, and whether its socket is counted in this epoch.
local function session_of(value)
  local session, at = string.match(value, "^(.*)\n(%d+)$")
  return session or value, at == epoch
end

-- How many words tell of a connection: the kind, session, connection, at, sockets, traceparent, claims, address.
local width = 8

-- Connections of a kind, from ARGV[first] to ARGV[last]. All of them with one call for each key but the stream, as calls
-- are what costs.
--   writes: those that are not held are entries; counts: they are held from now on.
local function connect(first, last_word, writes, counts)
  local connections, sessions, here = {}, {}, nil
  for i = first, last_word, width do
    connections[#connections + 1] = ARGV[i + 2]
    sessions[#sessions + 1] = ARGV[i + 1]
  end
  local values, counts_before = redis.call("HMGET", held, unpack(connections)), redis.call("HMGET", sockets, unpack(sessions))
  if process then
    local fields = {}
    for n, session in ipairs(sessions) do fields[n] = session .. "\n" .. process end
    here = redis.call("HMGET", sockets, unpack(fields))
  end
  local count_of, here_of, taken = {}, {}, {}
  local added, new_held, new_counts, back = 0, {}, {}, {}
  for n, session in ipairs(sessions) do
    local connection, i, value, is_counted = connections[n], first + width * (n - 1), values[n], false
    if value then is_counted = select(2, session_of(value)) end
    if not is_counted and not taken[connection] and (value or counts) then
      local count = ARGV[i + 4]
      if here then
        here_of[session] = (here_of[session] or tonumber(here[n] or 0)) + 1
        count = here_of[session]
        new_counts[#new_counts + 1] = session .. "\n" .. process
        new_counts[#new_counts + 1] = count
      end
      if not value and writes then
        local more = {}
        for word, name in ipairs({ "traceparent", "claims", "address" }) do
          local value = ARGV[i + 4 + word]
          if value ~= "" then
            more[#more + 1] = name
            more[#more + 1] = value
          end
        end
        add("connected", "session", session, "connection", connection, "at", ARGV[i + 3], "sockets", count, unpack(more))
        added = added + 1
      end
      taken[connection] = true
      count_of[session] = (count_of[session] or tonumber(counts_before[n] or 0)) + 1
      new_held[#new_held + 1] = connection
      new_held[#new_held + 1] = counted(session)
      new_counts[#new_counts + 1] = session
      new_counts[#new_counts + 1] = count_of[session]
      back[#back + 1] = session
    end
  end
  if #back > 0 then
    redis.call("HSET", held, unpack(new_held))
    redis.call("HSET", sockets, unpack(new_counts))
    holds = true
    if redis.call("ZREM", vacant, unpack(back)) > 0 then
      shared = nil
    elseif shared then
      shared = shared < 2 and 1 or 3
    end
  end
  return added
end

-- Sessions that are vacant unless a socket is open: that of each connection from ARGV[first] to ARGV[last].
local function leave(first, last_word, grace)
  for i = first, last_word, width do
    if not redis.call("HGET", sockets, ARGV[i + 1]) then
      redis.call("ZADD", vacant, "NX", now_ms() + grace, ARGV[i + 1])
      shared = nil
    end
  end
end

local function disconnect(connection, at, code, count, position, grace)
  local value = redis.call("HGET", held, connection)
  if not value then return 0 end
  local session, is_counted = session_of(value)
  local field = process and session .. "\n" .. process
  if field then count = math.max(0, (tonumber(redis.call("HGET", sockets, field)) or 0) - (is_counted and 1 or 0)) end
  if position == "" then
    add("disconnected", "session", session, "connection", connection, "at", at, "code", code, "sockets", count)
  else
    add("disconnected", "session", session, "connection", connection, "at", at, "code", code, "sockets", count, "position", position)
  end
  redis.call("HDEL", held, connection)
  shared, holds = nil, nil
  if field and is_counted then
    if count > 0 then
      redis.call("HSET", sockets, field, count)
    else
      redis.call("HDEL", sockets, field)
    end
  end
  local left = is_counted and redis.call("HINCRBY", sockets, session, -1) or tonumber(redis.call("HGET", sockets, session) or 0)
  if left < 1 then
    redis.call("HDEL", sockets, session)
    redis.call("ZADD", vacant, now_ms() + grace, session)
  end
  return 1
end

-- A proxy tells what has happened. The generation, the call's number (0 for one that may come again, and does no harm),
-- "begin", "end" or both for the first and last call that tell all that it holds, the grace in ms, and the last entry
-- that it was told of; then for each event:
--   connected, session, connection, at, sockets, traceparent, claims, address
--   open, the same: it is connected, and that was written
--   leaving, the same: that was written, it has left since, and that may be written or not; it is told next
--   left, the same: it has left, and both were written
--   disconnected, connection, at, code, sockets, position
-- Returns how many entries were written, and the last one; -1 when nothing was done, as the proxy must begin.
if what == "tell" then
  local generation, call, part, grace, told = tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5], ARGV[6], ARGV[7]
  local begins = string.find(part, "begin", 1, true)
  look(grace, begins and told ~= "", not begins)
  if begins then
    if told_in ~= epoch or exist(stream) == 0 then
      -- What was written is gone with the stream: "+"; which connections were told is known, as they are held, or as
      -- none was: "0"; or it is not: "-". When nothing was lost, or others have ended all: "b", what is held is right.
      local is_gone = told ~= "" and (not current or exist(stream) == 0) and #redis.call("XREVRANGE", stream, told, told) == 0
      if is_gone or mode == "+" then
        mode = "+"
      elseif mode == "b" then
        mode = ""
      elseif exist(held) == 1 or (current and not holds) then
        mode = told_in == epoch and mode or "0"
      else
        mode = "-"
      end
    elseif mode == "b" then
      mode = ""
    end
    current, last, told_in = math.max(current or 0, generation), last or 0, epoch
  elseif told_in ~= epoch then
    keep()
    return { -1, "" }
  elseif call > 0 and call <= last then
    return { 0, "" }
  end
  local stays, added, i = not begins, 0, 8
  while i < #ARGV do
    if ARGV[i] == "disconnected" then
      added = added + disconnect(ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4], ARGV[i + 5], grace)
      i = i + 6
    else
      -- As many of a kind as follow each other.
      local kind, first = ARGV[i], i
      repeat i = i + width until ARGV[i] ~= kind
      if kind == "connected" or kind == "open" then
        added = added + connect(first, i - 1, kind == "connected" or mode ~= "-", true)
      elseif mode == "+" then
        added = added + connect(first, i - 1, true, true)
      elseif mode ~= "" then
        if kind == "leaving" then connect(first, i - 1, false, mode == "-") end
        leave(first, i - 1, grace)
      end
    end
  end
  if string.find(part, "end", 1, true) and current == generation then mode = "" end
  -- What was looked for, or has just been added, is there.
  if not (holds and stays) then holds = exist(held) == 1 end
  redis.call("SET", known, string.format("%.0f%s %.0f %s %d", current, mode, math.max(call, last), epoch, holds and 1 or 0))
  keep()
  return { added, newest }
end

-- The grace in ms, and the last entry that the proxy was told of. Returns 1 when nothing was lost, and it has told all
-- that it holds; -1 when it must begin.
if what == "check" then
  look(ARGV[3], ARGV[4] ~= "")
  keep()
  return { told_in == epoch and 1 or -1 }
end

-- Others end connections of a proxy that is dead: its generation, the grace in ms, when, and then the connections.
-- Returns how many were; -1 when the proxy has begun a newer generation, and lives.
if what == "bury" then
  local generation, grace, at = tonumber(ARGV[3]), ARGV[4], ARGV[5]
  look(grace)
  if current and current > generation then
    keep()
    return -1
  end
  local added = 0
  for i = 6, #ARGV do added = added + disconnect(ARGV[i], at, "1006", "0", "", grace) end
  if current then
    redis.call("SET", known, string.format("%.0f%s %.0f %s %d", current, mode, last, told_in, exist(held)))
  end
  keep()
  return added
end

-- All of them have been ended: the generation, the grace in ms, and how long a proxy that was not dead may still speak
-- of them, in ms.
if what == "buried" then
  local generation = tonumber(ARGV[3])
  look(ARGV[4])
  if not current or current <= generation then
    local text = string.format("%.0fb %.0f %s %d", current or generation, last or 0, told_in or "", exist(held))
    redis.call("SET", known, text, "PX", ARGV[5])
  end
  keep()
  return 1
end

-- The most sessions to tell of, the grace in ms, and the last entry that the proxy was told of. Returns how many were, -1
-- when none may be yet; and the ms until the next one is due, -1 for none.
if what == "vacated" then
  local now = now_ms()
  look(ARGV[4], ARGV[5] ~= "")
  local due = {}
  local waits = now < settled_at or (told_in ~= epoch and (current or ARGV[5] ~= ""))
  if not waits then due = redis.call("ZRANGEBYSCORE", vacant, "-inf", now, "LIMIT", 0, ARGV[3]) end
  for _, session in ipairs(due) do
    add("vacated", "session", session, "connection", "", "at", now)
    redis.call("ZREM", vacant, session)
    shared = nil
  end
  keep()
  local next = redis.call("ZRANGE", vacant, 0, 0, "WITHSCORES")
  if waits then return { -1, math.max(1000, settled_at - now) } end
  return { #due, next[2] and math.max(0, next[2] - now) or -1 }
end

-- The proxy has nothing of the agent any more.
if what == "forget" then
  redis.call("DEL", known)
  if exist(sockets, vacant) == 0 then redis.call("DEL", epoch_key) end
  return 1
end

-- Deletes an inbox into which nothing was written for so many ms, and which no group reads. Returns the ms after which
-- that is to be tried again; -1 for never, as it is gone, or sessions or a consumer group use it.
if what == "expire" then
  if exist(stream) == 0 or exist(sockets, vacant) > 0 then return -1 end
  if #redis.call("XINFO", "GROUPS", stream) > 0 then return -1 end
  local entry = redis.call("XREVRANGE", stream, "+", "-", "COUNT", 1)[1]
  local left = entry and string.match(entry[1], "^%d+") + ARGV[3] - now_ms() or 0
  if left > 0 then return left end
  redis.call("DEL", stream)
  return -1
end

return redis.error_reply("ERR unknown: " .. what)
