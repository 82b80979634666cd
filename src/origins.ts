/** The origins that `ALLOWED_ORIGINS` lists, matched as browsers and app shells send them (RFC 6454, section 7). */

/** Which origins may connect. */
export class Origins {
  readonly #exact = new Set<string>();
  /** Scheme with its slashes, and a host's end from its dot on with the port, of each `scheme://*.host`. */
  readonly #subdomains: { readonly scheme: string; readonly end: string }[] = [];

  /**
   * A comma-separated list of `null`, `scheme://host[:port]`, and `scheme://*.host[:port]` for all subdomains.
   * @throws {Error} whose message is a rule that begins with "must", when an item can match nothing.
   */
  constructor(list: string) {
    for (const item of list.split(",").map((item) => item.trim())) this.#add(item);
  }

  /** Whether the value of an `Origin` header is listed. */
  has(origin: string): boolean {
    if (this.#exact.has(origin)) return true;
    return this.#subdomains.some(({ scheme, end }) =>
      origin.startsWith(scheme) && origin.endsWith(end) &&
      /^[a-z0-9_-]+(\.[a-z0-9_-]+)*$/.test(origin.slice(scheme.length, -end.length))
    );
  }

  #add(item: string): void {
    if (item === "null") return void this.#exact.add(item);
    const [, scheme, wildcard = "", host] = /^([a-z][a-z0-9+.-]*:\/\/)(\*\.)?([^\s/?#@*]+)$/.exec(item) ?? [];
    if (scheme === undefined || host === undefined || !canMatch(scheme, host)) {
      throw new Error(
        "must be * or a comma-separated list like https://app.example,https://*.example.com,capacitor://localhost,null" +
          `, each written as browsers send it; ${JSON.stringify(item)} can match nothing`,
      );
    }
    if (wildcard === "") this.#exact.add(scheme + host);
    else this.#subdomains.push({ scheme, end: `.${host}` });
  }
}

/** Whether a browser writes an origin so: in lower case, in ASCII, and without the scheme's own port. */
function canMatch(scheme: string, host: string): boolean {
  // For schemes that it does not know, a URL has no origin; their hosts are compared as written.
  const text = `${/^(https?|wss?|ftp):/.test(scheme) ? scheme : "x://"}${host}`;
  return URL.canParse(text) && new URL(text).host === host;
}
