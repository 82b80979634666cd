#!lua name=wsproxy
-- The log of a session is a stream under the name of its down channel. An entry's id is its position: "<ms>-<n>", where
-- ms is the time of writing and never goes back, and n counts from 1 without holes for as long as the log lives. An
-- entry has the field d (the payload), and k (the nonce) if one was given; the mark of an empty log has n = 0 and the
-- field m. An entry in another epoch than 0 has three fields: d, k (empty without a nonce) and e, the epoch in force.
--
-- n, the last nonce and the epoch are read from the log each time: whatever is remembered beside it is wrong after a failover.
-- While a library loads, Lua has nothing but redis.register_function; all the rest is there when a function is called.

-- What the proxy that loads the library writes here: see log_library.ts.
local VERSION = ""
local STARTED_MS = 0
local MAX_MESSAGES = 4096
local TTL_MS = 3600000
local MAX_MESSAGE_BYTES = 1048576
local SHARDED = false

local MAX_NONCE_BYTES = 128
local MAX_REASON_BYTES = 123
local MAX_AHEAD_MS = 16

-- As text, as they go to Redis with each call.
local MAXLEN = "" .. MAX_MESSAGES
local TTL_STEP_MS = (TTL_MS - TTL_MS % 16) / 16
local EXPIRY_MS = "" .. (TTL_MS + 4 * TTL_STEP_MS)
-- In a Cluster a plain PUBLISH goes to every node; a sharded one stays where the session's slot is.
local PUBLISH = SHARDED and "SPUBLISH" or "PUBLISH"

-- The newest ms that this server has given to an entry since the library was loaded.
local newest_ms = 0

local function refuse(text)
  return redis.error_reply("ERR " .. text)
end

-- What is wrong with the keys of a call, if anything is.
local function key_fault(keys)
  if not keys[1] or keys[2] then return "one key is needed, the session's down channel: there are " .. #keys end
  if not keys[1]:find("^session:.+:down$") then
    return "the key must be the session's down channel, session:{id}:down: it is " .. keys[1]:sub(1, 200)
  end
end

local function clock_ms()
  local time = redis.call("TIME")
  return time[1] * 1000 + (time[2] - time[2] % 1000) / 1000
end

-- The last entry, and its ms and n as numbers; or what is returned when the key is no log. XINFO would cost three times
-- as much.
local function last_entry(what, key)
  local entries = redis.pcall("XREVRANGE", key, "+", "-", "COUNT", "1")
  if entries.err then
    if not entries.err:find("^WRONGTYPE") then error(entries) end
    local text = "WRONGTYPE " .. what .. ": a log is a stream: " .. key:sub(1, 200) .. " is a key of another type"
    return nil, 0, 0, redis.error_reply(text)
  end
  local entry = entries[1]
  if not entry then return nil, 0, 0 end
  local ms, n = entry[1]:match("^(%d+)-(%d+)$")
  return entry, ms + 0, n + 0
end

-- The ms of a log's first entry. It is newer than any of a former life, which may have ended in this very millisecond,
-- or before the clock was set back: no position may come twice. Only when many logs begin at once it is just not older,
-- or it would run away from the clock.
local function first_ms(key, now)
  local ms = now
  if newest_ms == now + MAX_AHEAD_MS then ms = newest_ms elseif newest_ms >= now then ms = newest_ms + 1 end
  -- A stream that was emptied by hand remembers its last id.
  if redis.call("EXISTS", key) == 1 then
    local info = redis.call("XINFO", "STREAM", key)
    for i = 1, #info, 2 do
      if info[i] == "last-generated-id" then ms = math.max(ms, info[i + 1]:match("^%d+") + 1) end
    end
  end
  return ms
end

-- Logs and publishes a payload, and opens the next epoch with it if that is what it is for. Returns the position, the
-- receivers and the epoch; or nothing but an error.
local function append(what, keys, payload, nonce, epoch, begins)
  local key = keys[1]
  if #payload > MAX_MESSAGE_BYTES then
    return nil, refuse(what .. ": a payload may have " .. MAX_MESSAGE_BYTES .. " bytes (LOG_MAX_MESSAGE_BYTES): this one has "
      .. #payload)
  end
  if nonce and #nonce > MAX_NONCE_BYTES then
    return nil, refuse(what .. ": a nonce may have " .. MAX_NONCE_BYTES .. " bytes: this one has " .. #nonce)
  end
  if epoch and epoch ~= "0" and not epoch:find("^[1-9]%d*$") then
    return nil, refuse(what .. ": an epoch is a number that wsproxy_begin has returned: this one is " .. epoch:sub(1, 200))
  end

  local last, last_ms, n, fault = last_entry(what, key)
  if fault then return nil, fault end
  local in_force = last and last[2][6]
  local fenced = epoch and epoch ~= (in_force or "0")
  -- A begin that is sent again has changed the epoch itself.
  if nonce and last and nonce == last[2][4] and (begins or not fenced) then return last[1], 0, in_force end
  if fenced then
    return nil, redis.error_reply("FENCED " .. what .. ": the epoch in force is " .. (in_force or "0") .. ": this writer's is "
      .. epoch:sub(1, 200))
  end

  local now = clock_ms()
  local ms = now
  if last then
    -- The clock may have been set back.
    if ms < last_ms then ms = last_ms end
  else
    -- Looked at here only: a log that exists has the right name.
    local name_fault = key_fault(keys)
    if name_fault then return nil, refuse(what .. ": " .. name_fault) end
    ms = first_ms(key, now)
  end
  if ms > newest_ms then newest_ms = ms end
  if begins then in_force = ("%d"):format((in_force or 0) + 1) end

  -- format is twice as fast as two numbers that are concatenated.
  local position = ("%d-%d"):format(ms, n + 1)
  if in_force then
    redis.call("XADD", key, "MAXLEN", "~", MAXLEN, position, "d", payload, "k", nonce or "", "e", in_force)
  elseif nonce then
    redis.call("XADD", key, "MAXLEN", "~", MAXLEN, position, "d", payload, "k", nonce)
  else
    redis.call("XADD", key, "MAXLEN", "~", MAXLEN, position, "d", payload)
  end
  -- The TTL is set anew when another 16th of it has begun: a PEXPIRE with each message would be a tenth of the cost. It
  -- is done with each one while the log is ahead of the clock, as 16ths do not tell then. It is set to a quarter more than
  -- itself, as proxies prolong it in quarters while a client is attached: see log_upkeep.ts.
  if last_ms < now - now % TTL_STEP_MS or last_ms > now then redis.call("PEXPIRE", key, EXPIRY_MS) end
  return position, redis.call(PUBLISH, key, "\255" .. position .. "\n" .. payload), in_force
end

-- wsproxy_send down_channel payload [nonce [epoch]]: logs and publishes; returns {position, receivers}. A nonce equal to
-- that of the last entry returns that entry's position and does nothing, so that a client library may send a call again.
-- With an epoch that is not the one in force it is refused.
local function send(keys, args)
  local payload, nonce = args[1], args[2]
  if not keys[1] or keys[2] then return refuse("wsproxy_send: " .. key_fault(keys)) end
  if not payload or args[4] then
    return refuse("wsproxy_send: a payload is needed, and a nonce and an epoch at most: there are " .. #args .. " arguments")
  end
  if nonce == "" then nonce = nil end
  local position, receivers = append("wsproxy_send", keys, payload, nonce, args[3])
  if not position then return receivers end
  return { position, receivers }
end

-- wsproxy_begin down_channel payload nonce [epoch]: sends, and opens the next epoch with it; returns {position, receivers,
-- epoch}. Writers of the epochs before are refused from now on. With an epoch that is not the one in force it is refused.
local function begin(keys, args)
  local payload, nonce = args[1], args[2]
  if not keys[1] or keys[2] then return refuse("wsproxy_begin: " .. key_fault(keys)) end
  if not nonce or args[4] then
    return refuse("wsproxy_begin: a payload and a nonce are needed, and an epoch at most: there are " .. #args .. " arguments")
  end
  if nonce == "" then return refuse("wsproxy_begin: the nonce must not be empty") end
  local position, receivers, epoch = append("wsproxy_begin", keys, payload, nonce, args[3], true)
  if not position then return receivers end
  return { position, receivers, (epoch or 0) + 0 }
end

-- wsproxy_open down_channel: the position of the log's end. Makes a log with a mark if there is none, and sets its TTL
-- anew.
local function open(keys, args)
  local fault = key_fault(keys)
  if fault then return refuse("wsproxy_open: " .. fault) end
  if args[1] then return refuse("wsproxy_open: no arguments are taken: there are " .. #args) end

  local key = keys[1]
  local last, _, _, type_fault = last_entry("wsproxy_open", key)
  if type_fault then return type_fault end
  local position = last and last[1]
  if not last then
    newest_ms = first_ms(key, clock_ms())
    position = ("%d-0"):format(newest_ms)
    redis.call("XADD", key, position, "m", "")
  end
  redis.call("PEXPIRE", key, EXPIRY_MS)
  return position
end

-- Lua 5.1 knows nothing of UTF-8. Well-formed sequences (RFC 3629) become question marks; what is left with the high bit
-- is not UTF-8.
local function is_utf8(text)
  text = text:gsub("[\194-\223][\128-\191]", "?")
  text = text:gsub("\224[\160-\191][\128-\191]", "?")
  text = text:gsub("\237[\128-\159][\128-\191]", "?")
  text = text:gsub("[\225-\236\238\239][\128-\191][\128-\191]", "?")
  text = text:gsub("\240[\144-\191][\128-\191][\128-\191]", "?")
  text = text:gsub("[\241-\243][\128-\191][\128-\191][\128-\191]", "?")
  text = text:gsub("\244[\128-\143][\128-\191][\128-\191]", "?")
  return not text:find("[\128-\255]")
end

-- wsproxy_close down_channel code [reason]: the proxies close the session's sockets, after what was sent before it.
-- Returns the receivers.
local function close(keys, args)
  local fault = key_fault(keys)
  if fault then return refuse("wsproxy_close: " .. fault) end
  local code, reason = args[1], args[2] or ""
  if not code or args[3] then
    return refuse("wsproxy_close: a code is needed, and a reason at most: there are " .. #args .. " arguments")
  end
  if code ~= "1000" and not code:find("^[34]%d%d%d$") then
    return refuse("wsproxy_close: the code must be 1000, or from 3000 to 4999: it is " .. code:sub(1, 200))
  end
  if #reason > MAX_REASON_BYTES then
    return refuse("wsproxy_close: a reason may have " .. MAX_REASON_BYTES .. " bytes: this one has " .. #reason)
  end
  if not is_utf8(reason) then return refuse("wsproxy_close: the reason must be UTF-8") end
  local json = '{"code":' .. code .. ',"reason":' .. cjson.encode(reason) .. "}"
  return redis.call(PUBLISH, keys[1], "\255!close\n" .. json)
end

-- wsproxy_settings: what the proxy that loaded the library has written into it, as names and values.
local function settings()
  return {
    "version", VERSION,
    "started_ms", STARTED_MS,
    "max_messages", MAX_MESSAGES,
    "ttl_ms", TTL_MS,
    "max_message_bytes", MAX_MESSAGE_BYTES,
    "sharded", SHARDED and 1 or 0,
  }
end

-- A full Redis refuses to log, as wsproxy_send and wsproxy_begin are not marked allow-oom. It can still end a session, and open a log, or
-- no client could resume: a mark takes 5 KB.
redis.register_function("wsproxy_send", send)
redis.register_function("wsproxy_begin", begin)
redis.register_function({ function_name = "wsproxy_open", callback = open, flags = { "allow-oom" } })
redis.register_function({ function_name = "wsproxy_close", callback = close, flags = { "allow-oom" } })
redis.register_function({ function_name = "wsproxy_settings", callback = settings, flags = { "no-writes" } })
