#!lua name=wsproxy
-- The log of a session is a stream under the name of its down channel. An entry's id is its position: "<ms>-<n>", where
-- ms is the time of writing and never goes back, and n counts from 1 without holes. An entry has the field d (the
-- payload), and k (the nonce) if one was given; the mark of an empty log has n = 0 and the field m.
-- The proxy replaces the values below when it loads this.
local MAX_MESSAGES = 4096
local TTL_MS = 3600000
local MAX_MESSAGE_BYTES = 1048576
local PUBLISH = 'PUBLISH'

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- The last entry: its ms and n as numbers, its id and its fields; nothing when there is none.
local function last_entry(key)
  local entry = redis.call('XREVRANGE', key, '+', '-', 'COUNT', 1)[1]
  if not entry then return nil end
  local dash = string.find(entry[1], '-', 1, true)
  return tonumber(string.sub(entry[1], 1, dash - 1)), tonumber(string.sub(entry[1], dash + 1)), entry[1], entry[2]
end

-- A time at which a log can begin anew. It must be newer than any of a former life, which may have ended in this very
-- millisecond; and a stream that was emptied by hand remembers its last id.
local function fresh_ms(key)
  local ms = now_ms() + 1
  if redis.call('EXISTS', key) == 1 then
    local info = redis.call('XINFO', 'STREAM', key)
    for i = 1, #info, 2 do
      if info[i] == 'last-generated-id' then
        ms = math.max(ms, tonumber(string.match(info[i + 1], '^%d+')) + 1)
      end
    end
  end
  return ms
end

-- wsproxy_send down_channel payload [nonce]: logs and publishes; returns {position, receivers}. A nonce equal to that of
-- the last entry returns that entry's position and does nothing, so that a client library may send a call again.
local function send(keys, args)
  local key, payload, nonce = keys[1], args[1], args[2]
  if #keys ~= 1 or not payload or #args > 2 then
    return redis.error_reply('ERR wsproxy_send takes one key, a payload and maybe a nonce')
  end
  if #payload > MAX_MESSAGE_BYTES then
    return redis.error_reply('ERR the payload has ' .. #payload .. ' bytes, and LOG_MAX_MESSAGE_BYTES is ' .. MAX_MESSAGE_BYTES)
  end
  local last_ms, last_n, last_id, fields = last_entry(key)
  local ms, n
  if last_ms then
    if nonce and fields[3] == 'k' and fields[4] == nonce then return { last_id, 0 } end
    ms, n = math.max(now_ms(), last_ms), last_n + 1
  else
    ms, n = fresh_ms(key), 1
  end
  local id = string.format('%.0f-%.0f', ms, n)
  if nonce then
    redis.call('XADD', key, 'MAXLEN', '~', MAX_MESSAGES, id, 'd', payload, 'k', nonce)
  else
    redis.call('XADD', key, 'MAXLEN', '~', MAX_MESSAGES, id, 'd', payload)
  end
  -- In 16ths of it: a PEXPIRE with each message would be a tenth of the cost.
  local slice = TTL_MS / 16
  if not last_ms or math.floor(last_ms / slice) ~= math.floor(ms / slice) then
    redis.call('PEXPIRE', key, TTL_MS)
  end
  return { id, redis.call(PUBLISH, key, '\255' .. id .. '\n' .. payload) }
end

-- wsproxy_open down_channel: the position of the log's end. Makes a log with a mark if there is none, and refreshes its
-- TTL.
local function open(keys)
  local key = keys[1]
  if #keys ~= 1 then return redis.error_reply('ERR wsproxy_open takes one key') end
  local _, _, id = last_entry(key)
  if not id then
    id = string.format('%.0f-0', fresh_ms(key))
    redis.call('XADD', key, id, 'm', '')
  end
  redis.call('PEXPIRE', key, TTL_MS)
  return id
end

-- wsproxy_close down_channel code reason: the proxies close the session's sockets, after what was sent before it.
-- Returns the receivers.
local function close(keys, args)
  local code, reason = tonumber(args[1]), args[2] or ''
  if #keys ~= 1 or #args > 2 then
    return redis.error_reply('ERR wsproxy_close takes one key, a code and a reason')
  end
  if not code or code % 1 ~= 0 or (code ~= 1000 and (code < 3000 or code > 4999)) then
    return redis.error_reply('ERR the code must be 1000, or from 3000 to 4999')
  end
  if #reason > 123 then
    return redis.error_reply('ERR the reason has ' .. #reason .. ' bytes, and 123 fit into a close frame')
  end
  local json = cjson.encode({ code = code, reason = reason })
  return redis.call(PUBLISH, keys[1], '\255!close\n' .. json)
end

redis.register_function('wsproxy_send', send)
redis.register_function('wsproxy_open', open)
redis.register_function { function_name = 'wsproxy_close', callback = close, flags = { 'allow-oom' } }
