-- The life of an agent's connections, for EVAL: who is connected is kept beside the inbox, so that an entry is written
-- exactly when that changes, whoever says so and however often.
-- KEYS: the inbox (a stream), its sessions' open sockets (a hash to their number), its vacant sessions (a sorted set, by
-- when that is to be told, in ms), and the connections that a proxy holds (a hash to their session); for "connected"
-- also those that it held under its former name.
-- ARGV: what to do, MAXLEN of the inbox, a number, and then the fields of one connection after the other.
local stream, sockets, vacant, held, former = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local what, max_entries, number = ARGV[1], ARGV[2], ARGV[3]

local function now_ms()
  local time = redis.call("TIME")
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Written before anything else is changed: when Redis refuses, nothing has happened.
local function add(...)
  redis.call("XADD", stream, "MAXLEN", "~", max_entries, "*", "type", what, ...)
end

-- session, connection, at, sockets, traceparent
if what == "connected" then
  local added = 0
  for i = 4, #ARGV, 5 do
    local session, connection = ARGV[i], ARGV[i + 1]
    if redis.call("HEXISTS", held, connection) == 0 then
      if former and redis.call("HEXISTS", former, connection) == 1 then
        redis.call("HSET", held, connection, session)
        redis.call("HDEL", former, connection)
      else
        local fields = { "session", session, "connection", connection, "at", ARGV[i + 2], "sockets", ARGV[i + 3] }
        if ARGV[i + 4] ~= "" then
          fields[#fields + 1] = "traceparent"
          fields[#fields + 1] = ARGV[i + 4]
        end
        add(unpack(fields))
        redis.call("HSET", held, connection, session)
        redis.call("HINCRBY", sockets, session, 1)
        redis.call("ZREM", vacant, session)
        added = added + 1
      end
    end
  end
  return added
end

-- connection, at, code, sockets, position; the number is the grace in ms
if what == "disconnected" then
  local added = 0
  for i = 4, #ARGV, 5 do
    local connection = ARGV[i]
    local session = redis.call("HGET", held, connection)
    if session then
      local fields = { "session", session, "connection", connection, "at", ARGV[i + 1], "code", ARGV[i + 2], "sockets", ARGV[i + 3] }
      if ARGV[i + 4] ~= "" then
        fields[#fields + 1] = "position"
        fields[#fields + 1] = ARGV[i + 4]
      end
      add(unpack(fields))
      redis.call("HDEL", held, connection)
      if redis.call("HINCRBY", sockets, session, -1) < 1 then
        redis.call("HDEL", sockets, session)
        redis.call("ZADD", vacant, now_ms() + number, session)
      end
      added = added + 1
    end
  end
  return added
end

-- The number is the most sessions to tell of. Returns how many were, and the ms until the next one is due; -1 for none.
if what == "vacated" then
  local now = now_ms()
  local due = redis.call("ZRANGEBYSCORE", vacant, "-inf", now, "LIMIT", 0, number)
  for _, session in ipairs(due) do
    add("session", session, "connection", "", "at", now)
    redis.call("ZREM", vacant, session)
  end
  local next = redis.call("ZRANGE", vacant, 0, 0, "WITHSCORES")
  return { #due, next[2] and math.max(0, next[2] - now) or -1 }
end

return redis.error_reply("ERR unknown: " .. what)
