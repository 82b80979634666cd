/** The Redis users of docs/redis.md, as the page has them. */

/** What stands for their passwords. */
export const password = "a-password-of-the-tests";

/** The arguments of each `ACL SETUSER` of the page: a selector in parentheses is one, as redis-cli takes it in quotes. */
export async function rulesOf(user: string): Promise<string[][]> {
  const page = await Deno.readTextFile(new URL("../../docs/redis.md", import.meta.url));
  const lines = [...page.matchAll(/^ *ACL SETUSER (\S+) (.*)$/gm)].filter(([, name]) => name === user);
  return lines.map(([, , rules]) =>
    rules!.replace("PASSWORD", password).match(/"[^"]*"|\S+/g)!.map((word) => word.replaceAll('"', ""))
  );
}
