// FAVOR+ attention in JavaScript: a prompt at once, then a token at a time.
import { readFile } from "node:fs/promises";
import * as ort from "onnxruntime-web";

ort.env.wasm.numThreads = 1;
const session = await ort.InferenceSession.create(await readFile("attention.onnx"));
const tokens = JSON.parse(await readFile("tokens.json"));
const { heads, features, valueDim, length, prompt } = tokens;

// Positions `first` to `last` of an array in which the heads of a position lie side by side.
function positions(name, first, last) {
  const width = tokens[name].length / length;
  const part = tokens[name].slice(first * width, last * width);
  return new ort.Tensor("float32", Float32Array.from(part), [1, last - first, width]);
}

// Before the first key the sums are zero, and the maxima so low that any key passes them.
const sums = new Float32Array(heads * features * (valueDim + 1));
const maxima = new Float32Array(heads * features).fill(-1e30);
let state = {
  past_state: new ort.Tensor("float32", sums, [1, heads, features, valueDim + 1]),
  past_max: new ort.Tensor("float32", maxima, [1, heads, features]),
};

async function attend(first, last) {
  const [q, k, v] = ["q", "k", "v"].map((name) => positions(name, first, last));
  const { out, present_state, present_max } = await session.run({ q, k, v, ...state });
  state = { past_state: present_state, past_max: present_max };
  return [...out.data];
}

const out = await attend(0, prompt);
for (let i = prompt; i < length; i++) {
  out.push(...(await attend(i, i + 1)));
}
const difference = Math.max(...out.map((x, i) => Math.abs(x - tokens.out[i])));
console.log(`${length} tokens, largest difference to favor_np ${difference.toExponential(1)}`);
