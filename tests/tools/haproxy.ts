/** HAProxy with its file of deploy/. Needs haproxy; test:containers tries it with Docker as well. */

import { testBalancer } from "../harness/balancer.ts";

testBalancer({
  command: "haproxy",
  file: "haproxy.cfg",
  check: (config) => ["-c", "-q", "-f", config],
  serve: (config) => ["-db", "-f", config],
});
