/**
 * Prints the flags of the start task in deno.json for the container, so that the permissions are written once only:
 * without `--env-file`, as an image holds no settings, and without `--allow-net`, for which the container's start
 * script names the hosts. Throws when the task no longer has the form that this relies on.
 */

const { tasks } = JSON.parse(Deno.readTextFileSync("deno.json"));
const words = String(tasks.start.command).split(" ");
const left = (dropped: string) => {
  const at = words.indexOf(dropped);
  if (at < 0) throw new Error(`the start task must contain ${dropped}: it is ${JSON.stringify(tasks.start.command)}`);
  words.splice(at, 1);
};
for (const dropped of ["deno", "main.ts", "--env-file", "--allow-net"]) left(dropped);
console.log(words.join(" "));
