// Has a text answered: node generate.mjs ROUTER PROMPT [EXPERT[:WEIGHT]]..., and writes it as it comes.
// What else a router can do, and how to reach several or one with TLS, is in ask.mjs.
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const folder = (path) => fileURLToPath(new URL(path, import.meta.url));
const contracts = protoLoader.loadSync("hocket/v1/router.proto", {
  includeDirs: [folder("../../../proto")], enums: String, longs: String, defaults: true, oneofs: true,
});
const { hocket } = grpc.loadPackageDefinition(contracts);

/** `sql:0.7` as a message; a weight that is not there is the server's 1. A digest has a colon of its own. */
function toExpert(text) {
  const [, expert, weight] = /^(.*?)(?::(-?[0-9.]+))?$/.exec(text);
  return weight === undefined ? { expert } : { expert, weight: Number(weight) };
}

const [address, prompt, ...experts] = process.argv.slice(2);
const router = new hocket.v1.RouterService(address, grpc.credentials.createInsecure());
const request = { input: { prompt }, experts: experts.map(toExpert), sampling: { maxTokens: 64 } };
try {
  for await (const { event, plan, delta, finish } of router.generate(request, { deadline: Date.now() + 60_000 })) {
    if (event === "plan") {
      console.error(`base ${plan.baseName}: ${plan.experts.map(({ name, weight }) => `${weight} of ${name}`).join(", ") || "alone"}`);
    } else if (event === "delta") {
      process.stdout.write(delta.text);
    } else if (event === "finish") {
      console.log();
      console.error(`${finish.reason}, ${finish.usage.completionTokenCount} tokens`);
    }
  }
} catch (error) {
  console.error(`${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = 2;
}
