-- Keeps the newest time of an agent's revocations.
-- KEYS: the hash of revocations. ARGV: the agent, and the time in seconds.
local set = redis.call("HGET", KEYS[1], ARGV[1])
if not set or set + 0 < ARGV[2] + 0 then redis.call("HSET", KEYS[1], ARGV[1], ARGV[2]) end
return 1
