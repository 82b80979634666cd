import react from "@vitejs/plugin-react";
import { defineConfig } from "vite";

export default defineConfig({
  plugins: [react()],
  // npm links wsproxy-client to its folder: what that imports is found here, and a change of it is seen at once.
  resolve: { preserveSymlinks: true },
  optimizeDeps: { exclude: ["wsproxy-client"] },
  server: { proxy: { "/api": process.env.API_URL ?? "http://127.0.0.1:8001" } },
});
