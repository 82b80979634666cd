/** Ports for programs that are told theirs: what ./dev starts, in tests and in benchmarks. */

/** Where ports begin that the system gives to whoever asks for any (Linux; elsewhere they begin later). */
const ephemeral = 32_768;
const first = 10_240;

/**
 * A TCP port that no program listens on now. It is none that the system gives to connections: these come and go by the
 * thousand in a test run, and one would have the port before the program that is told it, or while that is restarted.
 */
export function sparePort(hostname = "127.0.0.1"): number {
  while (true) {
    const port = first + Math.floor(Math.random() * (ephemeral - first));
    try {
      Deno.listen({ hostname, port }).close();
      return port;
    } catch (error) {
      if (!(error instanceof Deno.errors.AddrInUse)) throw error;
    }
  }
}
