-- What is revoked, by agent, for all proxies.
-- KEYS: the hash, from an agent to a number: tokens issued before so many seconds since 1970 are revoked; one below 0 is
-- when a revocation was taken back, in milliseconds.
-- ARGV: for each agent its field, the number, and what must stand in its place, so that nothing newer is overwritten: ""
-- for nothing, "any" when a command says so. Even then an older revocation does not take the place of a newer one.
for i = 1, #ARGV, 3 do
  local field, number, expected = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local kept = redis.call("HGET", KEYS[1], field) or ""
  local is_newer = (tonumber(number) > 0) and (tonumber(kept) or 0) >= tonumber(number)
  if (expected == "any" or expected == kept) and not is_newer then redis.call("HSET", KEYS[1], field, number) end
end
return 1
