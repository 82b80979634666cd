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
