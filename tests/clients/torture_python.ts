/** The Python client tortured, with each Python that there is: a part of `deno task test:python`. */

import { nginx } from "../harness/balancer.ts";
import { pythonsHere } from "../harness/runtimes.ts";
import { testTorture } from "./short_torture.ts";
import { has } from "./torture.ts";

testTorture(
  "Python clients lose nothing untold, and are live again, while relays and a proxy are harmed",
  { sessions: 2 },
  async () => (await pythonsHere()).found,
);

// Over TLS the connections of Python 3.10 end in another way.
testTorture(
  "Python clients behind deploy/nginx.conf lose nothing untold, and are live again",
  { sessions: 2, balancer: nginx, ignore: !await has(nginx.command) },
  async () => (await pythonsHere()).found,
);
