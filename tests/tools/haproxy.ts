/** HAProxy with its file of deploy/. Needs haproxy; test:containers tries it with Docker as well. */

import { testTortureBehind } from "../clients/short_torture.ts";
import { haproxy, testBalancer } from "../harness/balancer.ts";

testBalancer(haproxy);
testTortureBehind(haproxy);
