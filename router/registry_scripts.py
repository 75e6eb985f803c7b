"""What the shared registry does inside Redis: each script is one atomic step.

All ages are told by Redis's own clock, so routers need not agree on the time. A worker is four
entries under its instance id (registration, address, epoch, and when somebody last heard it), and
one under its address. The scripts share these keys:

    1 beats         sorted set   instance id -> when it was last heard, milliseconds
    2 registrations hash         instance id -> RegisterRequest, serialised
    3 addresses     hash         instance id -> address
    4 epochs        hash         instance id -> epoch
    5 owners        hash         address -> instance id
    6 left          sorted set   instance id of one that said goodbye -> when
    7 version       string       changes with every change of the list

An instance id never comes back after its goodbye, whichever router still believes in it; and an
address belongs to the instance that started last, whichever router speaks for the other.
"""

KEYS = ("beats", "registrations", "addresses", "epochs", "owners", "left", "version")

_COMMON = """
local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)
local ttl = tonumber(ARGV[1])

local function drop(id)
  local address = redis.call('HGET', KEYS[3], id)
  if address and redis.call('HGET', KEYS[5], address) == id then
    redis.call('HDEL', KEYS[5], address)
  end
  redis.call('HDEL', KEYS[2], id)
  redis.call('HDEL', KEYS[3], id)
  redis.call('HDEL', KEYS[4], id)
  redis.call('ZREM', KEYS[1], id)
end

local function touch()
  -- Of the clock, so that it never repeats, also where Redis came back empty.
  redis.call('SET', KEYS[7], clock[1] .. '.' .. clock[2])
end

local function expire()
  local old = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', '(' .. (now - ttl))
  for _, id in ipairs(old) do drop(id) end
  if #old > 0 then touch() end
  redis.call('ZREMRANGEBYSCORE', KEYS[6], '-inf', '(' .. (now - 60 * ttl))
end

local function keep()
  -- Nothing stays for ever where the last router has gone.
  for _, key in ipairs(KEYS) do redis.call('PEXPIRE', key, 120 * ttl) end
end
"""

REGISTER = (
    _COMMON
    + """
-- ARGV: ttl ms, instance id, address, epoch, registration
-- Returns 'listed'; 'left' where it has said goodbye; 'replaced' and the id of a newer instance.
local id, address, epoch = ARGV[2], ARGV[3], tonumber(ARGV[4])
expire()
if redis.call('ZSCORE', KEYS[6], id) then return {'left', ''} end
local owner = redis.call('HGET', KEYS[5], address)
if owner and owner ~= id then
  local theirs = tonumber(redis.call('HGET', KEYS[4], owner) or '0')
  if epoch > 0 and theirs > epoch then return {'replaced', owner} end
  drop(owner)
  redis.call('ZADD', KEYS[6], now, owner)
  touch()
end
if redis.call('HGET', KEYS[2], id) ~= ARGV[5] then
  drop(id)
  redis.call('HSET', KEYS[2], id, ARGV[5])
  redis.call('HSET', KEYS[3], id, address)
  redis.call('HSET', KEYS[4], id, ARGV[4])
  redis.call('HSET', KEYS[5], address, id)
  touch()
end
redis.call('ZADD', KEYS[1], now, id)
keep()
return {'listed', ''}
"""
)
"""Lists a worker, unless a newer instance has its address."""

REMOVE = (
    _COMMON
    + """
-- ARGV: ttl ms, instance id
drop(ARGV[2])
redis.call('ZADD', KEYS[6], now, ARGV[2])
touch()
keep()
return redis.status_reply('OK')
"""
)
"""Takes a worker off the list for good."""

SYNC = (
    _COMMON
    + """
-- ARGV: ttl ms, version that the router knows, ids of the workers that it heard
-- Returns {version, ids heard but not listed, {id, age ms, ...}, {registration, ...} or {}}.
-- The registrations are in the order of the ages, and left out where the version is known.
expire()
local missing = {}
for i = 3, #ARGV do
  if redis.call('HEXISTS', KEYS[2], ARGV[i]) == 1 then
    redis.call('ZADD', KEYS[1], now, ARGV[i])
  else
    missing[#missing + 1] = ARGV[i]
  end
end
local version = redis.call('GET', KEYS[7]) or ''
local ages, registrations = {}, {}
local beats = redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES')
for i = 1, #beats, 2 do
  ages[#ages + 1] = beats[i]
  ages[#ages + 1] = now - tonumber(beats[i + 1])
  if version ~= ARGV[2] then
    registrations[#registrations + 1] = redis.call('HGET', KEYS[2], beats[i])
  end
end
if #beats > 0 then keep() end
return {version, missing, ages, registrations}
"""
)
"""Tells the shared list whom this router heard, and learns the list."""
