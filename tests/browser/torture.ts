/** The clients of a page tortured: it is frozen, and loses its network, beside all that befalls the others. */

import { testTorture } from "../clients/short_torture.ts";

testTorture("A page's clients lose nothing untold, and are live again, whatever befalls the page", { page: true });
