import { runtimesHere } from "../harness/runtimes.ts";
import { testTorture } from "./short_torture.ts";

testTorture(
  "Clients lose nothing untold, and are live again, while relays and a proxy are harmed",
  {},
  runtimesHere,
);
