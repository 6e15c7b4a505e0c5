// A language model of bytes in JavaScript: goes on with a prompt, always with the most likely byte.
import { readFile } from "node:fs/promises";
import * as ort from "onnxruntime-web";

ort.env.wasm.numThreads = 1;
const session = await ort.InferenceSession.create(await readFile("model.onnx"));

// Before the first token: no positions, sums of zero, and maxima that any key passes.
const state = {};
for (const { name, type, shape } of session.inputMetadata) {
  if (name.startsWith("past_")) {
    const sizes = shape.map((n) => ({ batch: 1, past_positions: 0 })[n] ?? n);
    const count = sizes.reduce((a, b) => a * b, 1);
    const data = type === "int64" ? new BigInt64Array(count) : new Float32Array(count);
    state[name] = new ort.Tensor(type, name.startsWith("past_max") ? data.fill(-1e30) : data, sizes);
  }
}

// Read tokens; return the one that most likely comes next.
async function next(tokens) {
  const input = new ort.Tensor("int64", BigInt64Array.from(tokens, BigInt), [1, tokens.length]);
  const { logits, ...present } = await session.run({ tokens: input, ...state });
  for (const [name, tensor] of Object.entries(present)) {
    state[name.replace("present", "past")] = tensor;
  }
  const last = logits.data.subarray(-logits.dims[2]);
  return last.indexOf(Math.max(...last));
}

const text = [...Buffer.from(process.argv[2] ?? "The ")];
let token = await next(text);
for (let i = 0; i < 40; i++) {
  text.push(token);
  token = await next([token]);
}
console.log(Buffer.from(text).toString());
