/** What of clients/js is seen by TypeScript, and what a package of it holds. */

import assert from "node:assert/strict";
import { faultsOfUser } from "../../scripts/client_types.ts";

Deno.test("A TypeScript program with exactOptionalPropertyTypes may give what it has, as it has it", () => {
  const program = `
    import WebSocketOfNpm from "ws";
    import { Connection, type Options, type Receipt, UnsentError } from "./wsproxy.js";
    import { gapCode, ResumingWebSocket } from "./websocket.js";
    import { type Session, useSession } from "./react.js";
    declare const position: string | undefined;
    const options: Options = {
      url: "wss://localhost/agent/ws/s1",
      token: async () => "",
      onMessage(text, position) {
        const length: number = text.length + (position?.length ?? 0);
      },
      onState: (state, close) => state === "closed" && close?.code === gapCode,
      position,
      historyLoaded: position === undefined ? undefined : true,
    };
    const connection = new Connection({ ...options, WebSocket: WebSocketOfNpm });
    new Connection({ ...options, token: () => "", onMessage: async () => {}, WebSocket, fetch });
    const sent: Promise<Receipt> = connection.submit("{}", { id: position });
    sent.catch((error: unknown) => error instanceof UnsentError && error.reason === "full");
    const Resuming: typeof WebSocket = ResumingWebSocket.with({ token: () => "", position });
    new Resuming("wss://localhost").onmessage = ({ data }) => data;
    const session: Session = useSession(options);
  `;
  assert.deepEqual(faultsOfUser(program), []);
  const wrong = 'import { Connection } from "./wsproxy.js"; new Connection({ url: "", token: 1, onMessage() {} });';
  assert.match(faultsOfUser(wrong).join(), /'number' is not assignable/);
});

Deno.test("A package of clients/js holds its modules, their types and nothing else", async () => {
  const { exports, files } = JSON.parse(
    Deno.readTextFileSync(new URL("../../clients/js/package.json", import.meta.url)),
  );
  assert.deepEqual(files, ["*.js", "*.d.ts"]);
  const modules = Object.values<{ types: string; default: string }>(exports).flatMap((each) => Object.values(each));
  const { stdout } = await new Deno.Command("npm", {
    args: ["pack", "--dry-run", "--json", "--offline", "--loglevel=error"],
    cwd: new URL("../../clients/js", import.meta.url),
    env: { npm_config_update_notifier: "false" },
  }).output();
  const [packed] = JSON.parse(new TextDecoder().decode(stdout));
  const paths = packed.files.map(({ path }: { path: string }) => `./${path}`);
  assert.deepEqual(paths.sort(), [...modules, "./answer.js", "./queue.js", "./README.md", "./package.json"].sort());
});
