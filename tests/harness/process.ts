/** A child process's output, and the commands that look at a process. */

const maxPassed = 20;

/** A child process's output, line by line. */
export function lines(stream: ReadableStream<Uint8Array<ArrayBuffer>>) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  /** The last lines that did not fit. */
  const passed: string[] = [];
  return {
    /** Reads up to the line that fits, and returns it. */
    async until(fits: (line: string) => boolean): Promise<string> {
      while (true) {
        const end = rest.indexOf("\n");
        if (end >= 0) {
          const line = rest.slice(0, end);
          rest = rest.slice(end + 1);
          if (fits(line)) return line;
          passed.push(line);
          if (passed.length > maxPassed) passed.shift();
          continue;
        }
        const { value, done } = await reader.read();
        if (done) throw new Error(`output ended; last:\n${[...passed, rest].join("\n")}`);
        rest += value;
      }
    },
    /** Reads and forgets the rest, so that the process never waits for us. */
    drain(): void {
      (async () => {
        while (!(await reader.read()).done);
      })();
    },
    /** All the rest. */
    async rest(): Promise<string> {
      while (true) {
        const { value, done } = await reader.read();
        if (done) return rest;
        rest += value;
      }
    },
  };
}

/** What a command prints. Deno itself may read /proc only with all permissions. */
export function shell(command: string): string {
  if (Deno.build.os !== "linux") return "0";
  return new TextDecoder().decode(new Deno.Command("sh", { args: ["-c", command] }).outputSync().stdout);
}
