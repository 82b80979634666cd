/**
 * The types of clients/js, written by TypeScript from the JSDoc of its modules; and what TypeScript says of a program
 * that uses them.
 */

import { dirname } from "node:path";
import ts from "typescript";
import project from "../deno.json" with { type: "json" };

const folder = new URL("../clients/js/", import.meta.url).pathname;
/** The modules of clients/js that a program sees types of. */
export const clientModules = [
  "wsproxy",
  "websocket",
  "react",
  "ai",
  "chat",
  "ag_ui",
  "tanstack",
  "langgraph",
  "backend",
  "answer",
  "runs",
];

const options: ts.CompilerOptions = {
  allowJs: true,
  checkJs: true,
  strict: true,
  exactOptionalPropertyTypes: true,
  noUncheckedIndexedAccess: true,
  skipLibCheck: true,
  declaration: true,
  emitDeclarationOnly: true,
  stripInternal: true,
  target: ts.ScriptTarget.ES2024,
  lib: ["lib.es2024.d.ts", "lib.dom.d.ts", "lib.dom.iterable.d.ts"],
  module: ts.ModuleKind.NodeNext,
  types: [],
};

/** What the modules take of React, of the AI SDK, of AG-UI and of TanStack AI: their own types need not be installed for this. */
const peerTypes = `${folder}_peers.d.ts`;
const peerSource = `declare module "react" {
  export interface RefObject<T> { current: T }
  export function useRef<T>(initial: T): RefObject<T>;
  export function useState<T>(initial: () => T): [T, (next: T) => void];
  export function useCallback<T>(callback: T, dependencies: readonly unknown[]): T;
  export function useEffect(effect: () => void | (() => void), dependencies?: readonly unknown[]): void;
}
declare module "ai" {
  export interface UIMessage { id: string, role: string, parts: unknown[], metadata?: unknown }
  export type UIMessageChunk =
    | { type: "start", messageId?: string, messageMetadata?: unknown }
    | { type: "error", errorText: string }
    | { type: "message-metadata" | "reset-step" | "start-step" | "finish" | "abort" }
    | { type: "data-", data: unknown, transient?: boolean };
  interface Request { chatId: string, abortSignal?: AbortSignal | undefined, headers?: Record<string, string> | Headers,
    body?: object, metadata?: unknown }
  export interface ChatTransport<M> {
    readonly resumeStreamIsReplay?: boolean;
    close?(): void;
    sendMessages(options: Request & { trigger: string, messageId: string | undefined, messages: M[] }):
      Promise<ReadableStream<UIMessageChunk>>;
    reconnectToStream(options: Request): Promise<ReadableStream<UIMessageChunk> | null>;
  }
}
declare module "rxjs" {
  export interface Subscriber<T> { next(value: T): void, error(error: unknown): void, complete(): void }
  export class Observable<T> { constructor(subscribe: (subscriber: Subscriber<T>) => () => void) }
}
declare module "@ag-ui/client" {
  export interface BaseEvent { type: string }
  export interface AgentConfig { threadId?: string }
  export interface RunAgentInput { threadId: string, runId: string, state?: unknown, messages: { id: string }[] }
  export abstract class AbstractAgent {
    constructor(config: AgentConfig);
    // What is declared as it is here would be left out of the types.
    abstract run(input: RunAgentInput): unknown;
    protected connect(input: RunAgentInput): unknown;
    abortRun(): unknown;
    clone(): any;
  }
}
declare module "@tanstack/ai/client" {
  export interface UIMessage { id: string, role: string, parts: unknown[] }
  export interface ModelMessage { id?: string, role: string, content: unknown }
  export interface StreamChunk { type: string }
  export function uiMessagesToWire(messages: (UIMessage | ModelMessage)[]): { id: string, role: string }[];
}
declare module "@tanstack/ai-client" {
  import { ModelMessage, StreamChunk, UIMessage } from "@tanstack/ai/client";
  interface Context { threadId: string, runId: string, parentRunId?: string, resume?: unknown[], clientTools?: unknown[],
    forwardedProps?: Record<string, unknown> }
  interface Hydration { messages: UIMessage[], activeRun: { runId: string } | null, interrupts: { runId: string } | null }
  export interface ResumableConnectConnectionAdapter {
    connect(messages: UIMessage[] | ModelMessage[], data?: Record<string, unknown>, signal?: AbortSignal, context?: Context):
      AsyncIterable<StreamChunk>;
    hydrate?(threadId: string): Promise<Hydration>;
    joinRun(runId: string, signal?: AbortSignal): AsyncIterable<StreamChunk>;
  }
}
`;

const parsed = new Map<string, ts.SourceFile | undefined>();

/** Compiles these files; `virtual` ones exist by their text, or not at all where it is undefined. */
function compile(roots: readonly string[], virtual: Readonly<Record<string, string | undefined>>) {
  const host = ts.createCompilerHost(options);
  const { fileExists, readFile, getSourceFile } = host;
  host.fileExists = (path) => (path in virtual ? virtual[path] !== undefined : fileExists(path));
  host.readFile = (path) => (path in virtual ? virtual[path] : readFile(path));
  host.getSourceFile = (path, languageVersion, ...rest) => {
    if (path in virtual) return ts.createSourceFile(path, virtual[path]!, languageVersion);
    if (!parsed.has(path)) parsed.set(path, getSourceFile(path, languageVersion, ...rest));
    return parsed.get(path);
  };
  // Deno keeps packages in a cache, beside the one that this compiler is in.
  const packages = dirname(dirname(dirname(dirname(ts.getDefaultLibFilePath(options)))));
  host.resolveModuleNameLiterals = (literals, containing, _redirected, options) =>
    literals.map(({ text }) => {
      const found = ts.resolveModuleName(text, containing, options, host);
      if (found.resolvedModule || !/^[a-z]+$/.test(text)) return found;
      const resolvedFileName = typesOf(packages, text);
      if (resolvedFileName === undefined) return found;
      return { resolvedModule: { resolvedFileName, extension: ts.Extension.Dts, isExternalLibraryImport: true } };
    });
  const written: Record<string, string> = {};
  const program = ts.createProgram([...roots], options, host);
  program.emit(undefined, (path, text) => (written[path.slice(folder.length)] = text));
  const faults = ts.getPreEmitDiagnostics(program).map(({ messageText, file, start = 0 }) => {
    const line = file === undefined ? 0 : file.getLineAndCharacterOfPosition(start).line + 1;
    return `${file?.fileName.slice(folder.length)}:${line}: ${ts.flattenDiagnosticMessageText(messageText, "\n")}`;
  });
  return { written, faults };
}

/** The declarations of a package that are installed as @types. */
function typesOf(packages: string, name: string): string | undefined {
  const imports: Readonly<Record<string, string>> = project.imports;
  const [, version] = /@([\d.]+)$/.exec(imports[`@types/${name}`] ?? "") ?? [];
  return version && `${packages}/@types/${name}/${version}/index.d.ts`;
}

let rendered: Record<string, string> | undefined;

/** The declarations of clients/js, by name of the file. @throws for what TypeScript finds wrong in it. */
export function clientTypes(): Record<string, string> {
  if (rendered) return rendered;
  // What was written before must not be taken for the modules.
  const virtual: Record<string, string | undefined> = { [peerTypes]: peerSource };
  for (const name of clientModules) virtual[`${folder}${name}.d.ts`] = undefined;
  const { written, faults } = compile([peerTypes, ...clientModules.map((name) => `${folder}${name}.js`)], virtual);
  if (faults.length > 0) throw new Error(faults.join("\n"));
  return (rendered = Object.fromEntries(clientModules.map((name) => {
    // From types of JavaScript TypeScript strips nothing: what is @internal goes in another pass, over those types.
    const input = { fileName: `${name}.ts`, compilerOptions: options };
    const { outputText } = ts.transpileDeclaration(written[`${name}.d.ts`]!, input);
    return [`${name}.d.ts`, `// Generated by "deno task docs" from ${name}.js.\n${outputText}`];
  })));
}

/** What TypeScript says of a program that lies beside the modules, and sees the declarations that have been written. */
export function faultsOfUser(source: string): string[] {
  const user = `${folder}user.ts`;
  return compile([user], { [user]: source }).faults;
}
