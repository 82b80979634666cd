/** nginx with its file of deploy/. Needs nginx; test:containers tries it with Docker as well. */

import { testBalancer } from "../harness/balancer.ts";

const directives = (folder: string) => ["-p", folder, "-e", "stderr", "-g", `daemon off; pid ${folder}/pid;`];

testBalancer({
  command: "nginx",
  file: "nginx.conf",
  check: (config, folder) => ["-t", "-q", "-c", config, ...directives(folder)],
  serve: (config, folder) => ["-c", config, ...directives(folder)],
  // Where a user who is not root may write.
  adapt: (text, folder) =>
    text.replace(
      /^http \{\n/m,
      (line) =>
        line +
        ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map((name) => `  ${name}_temp_path ${folder};\n`).join(""),
    ).replaceAll("/dev/stdout", `${folder}/log`).replaceAll("/dev/stderr", `${folder}/errors`),
});
