-- Tells all sockets of a session that one of them takes the others' place. From a script, as text cannot hold the
-- envelope's first byte.
-- KEYS: the session's down channel. ARGV: the JSON that says which socket it is, and the command to publish with.
return redis.call(ARGV[2], KEYS[1], "\255!replace\n" .. ARGV[1])
