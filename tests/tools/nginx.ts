/** nginx with its file of deploy/. Needs nginx; test:containers tries it with Docker as well. */

import { testTortureBehind } from "../clients/short_torture.ts";
import { nginx, testBalancer } from "../harness/balancer.ts";

testBalancer(nginx);
testTortureBehind(nginx);
