// Asks a Hocket router: node ask.mjs ROUTER MODEL ROW..., where a row is numbers like 0.5,-1,2.
// ROUTER is host:port, dns:///name:port, or ipv4:HOST:PORT,HOST:PORT. HOCKET_CA_FILE turns TLS on.
import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const folder = (path) => fileURLToPath(new URL(path, import.meta.url));
const contracts = protoLoader.loadSync(
  ["hocket/v1/router.proto", "hocket/vendored/health.proto", "google/rpc/status.proto", "google/rpc/error_details.proto"],
  { includeDirs: [folder("../../../proto"), folder("..")], enums: String, longs: Number, defaults: true, oneofs: true },
);
const { hocket, grpc: { health } } = grpc.loadPackageDefinition(contracts);

// Several routers take turns, and a call that has got nothing yet is tried again at the next one.
const OPTIONS = {
  "grpc.max_receive_message_length": 16 * 2 ** 20,
  "grpc.service_config": JSON.stringify({
    loadBalancingConfig: [{ round_robin: {} }],
    methodConfig: [{
      name: [{ service: "hocket.v1.RouterService" }],
      retryPolicy: {
        maxAttempts: 4, initialBackoff: "0.1s", maxBackoff: "1s", backoffMultiplier: 2,
        retryableStatusCodes: ["UNAVAILABLE"],
      },
    }],
    retryThrottling: { maxTokens: 512, tokenRatio: 0.1 },
  }),
};

/** Rows of numbers as a tensor: float32, little-endian, row-major. */
function toTensor(rows) {
  const contents = Buffer.alloc(4 * rows.length * rows[0].length);
  rows.flat().forEach((value, index) => contents.writeFloatLE(value, 4 * index));
  return { datatype: "FP32", shape: [rows.length, rows[0].length], contents };
}

/** A tensor as rows of numbers. */
function toRows({ shape: [rows, columns], contents }) {
  const at = (row, column) => contents.readFloatLE(4 * (row * columns + column));
  return Array.from({ length: rows }, (_, row) => Array.from({ length: columns }, (_, column) => at(row, column)));
}

/** Status, stable reason and message of a failed call. Branch on the reason, never on the message. */
function describe(error) {
  const [bytes] = error.metadata?.get("grpc-status-details-bin") ?? [];
  const details = bytes ? contracts["google.rpc.Status"].deserialize(bytes).details : [];
  const packed = details.find((detail) => detail.type_url.endsWith("/google.rpc.ErrorInfo"));
  const reason = packed ? contracts["google.rpc.ErrorInfo"].deserialize(packed.value).reason : "-";
  return `${grpc.status[error.code]} ${reason}: ${error.details}`;
}

async function main(address, model, ...texts) {
  const credentials = process.env.HOCKET_CA_FILE
    ? grpc.credentials.createSsl(readFileSync(process.env.HOCKET_CA_FILE))
    : grpc.credentials.createInsecure();
  const router = new hocket.v1.RouterService(address, credentials, OPTIONS);
  const probe = new health.v1.Health(address, credentials, OPTIONS);
  const within = (seconds) => ({ deadline: Date.now() + 1000 * seconds }); // every call needs a deadline
  const show = JSON.stringify;

  const check = promisify(probe.check).bind(probe);
  console.log(`health: ${(await check({ service: "hocket.v1.RouterService" }, within(5))).status}`);

  const listMixtures = promisify(router.listMixtures).bind(router);
  for (let page = { nextPageToken: "" }; page; page = page.nextPageToken ? page : null) {
    page = await listMixtures({ pageToken: page.nextPageToken }, within(5));
    for (const { name, expertCount } of page.mixtures) console.log(`model: ${name}, experts: ${expertCount}`);
  }

  const input = toTensor(texts.map((text) => text.split(",").map(Number)));
  for await (const { event, plan, partial, final } of router.predict({ model, input, partials: true }, within(10))) {
    if (event === "plan") {
      if (plan.labels.length) console.log(`labels: ${plan.labels.join(", ")}`);
      for (const { expert, rows, weights } of plan.experts) {
        console.log(`plan: ${expert} rows ${show(rows)} weights ${show(weights)}`);
      }
    } else if (event === "partial") {
      console.log(`partial ${partial.sequence}: ${show(toRows(partial.value))} coverage ${show(partial.coverage)}`);
    } else if (event === "final") {
      const { combination, finish } = final;
      console.log(`final: ${show(toRows(combination.value))} coverage ${show(combination.coverage)} ${finish.reason}`);
    }
  }
  router.close();
  probe.close();
}

if (process.argv.length < 5) {
  console.error("node ask.mjs ROUTER MODEL ROW...");
  process.exit(2);
}
try {
  await main(...process.argv.slice(2));
} catch (error) {
  console.error(error.code ? describe(error) : error);
  process.exit(1);
}
