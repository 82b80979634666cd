import assert from "node:assert/strict";
import { Buffer } from "node:buffer";
import { ChannelTable, keyOf, type Named } from "../../src/redis/channel_table.ts";

class Channel implements Named<Channel> {
  nextOfHash: Channel | undefined;
  readonly key: string;
  constructor(readonly nameBytes: Uint8Array) {
    this.key = Buffer.from(nameBytes).toString("latin1");
  }
}

Deno.test("Channels are told apart by name, also those that share a hash", () => {
  // Among so many, about ten pairs share one of 2^32 hashes; in one run of 35,000 none does.
  const all = Array.from({ length: 300_000 }, () => new Channel(crypto.getRandomValues(new Uint8Array(8))));
  const channels = new ChannelTable<Channel>();
  for (const channel of all) channels.add(channel);
  const right = (channel: Channel) =>
    channels.find(new Uint8Array(channel.nameBytes)) === channel && channels.get(channel.key) === channel;
  assert(all.every(right), "each is found by its name");
  assert.equal(channels.size, all.length);
  assert.equal(new Set(channels).size, all.length, "each comes once");

  for (const [i, channel] of all.entries()) {
    if (i % 2 === 0) assert(channels.delete(channel), "it was there");
  }
  assert.equal(channels.size, all.length / 2);
  assert(
    all.every((channel, i) => i % 2 === 1 ? right(channel) : channels.find(channel.nameBytes) === undefined),
    "those that are left are found, and no others",
  );
  assert(!channels.delete(all[0]!), "it is there no more");

  for (const channel of channels) channels.delete(channel);
  assert.equal(channels.size, 0, "they can be deleted while they come");
  assert.deepEqual([...channels], []);
});

Deno.test("A channel is not mistaken for another one of its name", () => {
  const [first, second] = [new Channel(new Uint8Array([1])), new Channel(new Uint8Array([1]))];
  const channels = new ChannelTable<Channel>();
  channels.add(first);
  assert(!channels.delete(second));
  assert.equal(channels.find(second.nameBytes), first);
  assert.equal(channels.find(new Uint8Array([1, 1])), undefined);
});

Deno.test("A name is found by the bytes that Redis writes it in, whatever its characters", () => {
  const names = [
    "session:a:down",
    "session:ü:down",
    "session:字🎉:down",
    "session:\u0080ÿ\u0100:down",
    "session:Ã¼:down",
  ];
  const utf8 = new TextEncoder();
  const all = names.map((name) => new Channel(utf8.encode(name)));
  const channels = new ChannelTable<Channel>();
  for (const channel of all) channels.add(channel);
  for (const [i, name] of names.entries()) {
    assert.equal(channels.find(utf8.encode(name)), all[i]);
    assert.equal(channels.get(keyOf(name)), all[i]);
  }
});
