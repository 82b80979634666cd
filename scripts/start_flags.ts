/**
 * The start task's command in deno.json, which is where it is written: for those who start the proxy without the task.
 *
 * Run as a program it prints the flags for the container, so that the permissions are written once only: without
 * `--env-file`, as an image holds no settings, and without `--allow-net`, for which the container's start script names
 * the hosts.
 */

/** The words after `deno`, but for those that are dropped. @throws when one of them is not there. */
export function startWords(denoJson: string, ...dropped: string[]): string[] {
  const { tasks } = JSON.parse(denoJson);
  const [deno, ...words] = String(tasks.start.command).split(" ");
  if (deno !== "deno") throw new Error("the start task must be a plain deno command");
  for (const word of dropped) {
    const at = words.indexOf(word);
    if (at < 0) throw new Error(`the start task must contain ${word}: it is ${JSON.stringify(tasks.start.command)}`);
    words.splice(at, 1);
  }
  return words;
}

if (import.meta.main) {
  console.log(startWords(Deno.readTextFileSync("deno.json"), "main.ts", "--env-file", "--allow-net").join(" "));
}
