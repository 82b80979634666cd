/** The public keys that settings name, read once. */

import type { PublicKeySettings } from "../config.ts";
import { fetchKeys } from "../http/keys.ts";
import { parsePublicKeys, type PublicKeys } from "../public_keys.ts";

/** The keys as they are now. @throws {Error} with the reason why a proxy could not take them. */
export async function readKeys({ algorithms, source }: PublicKeySettings): Promise<PublicKeys> {
  return source.setting === "JWT_PUBLIC_KEY_FILE"
    ? source.keys
    : parsePublicKeys(await fetchKeys(source.url), algorithms);
}
