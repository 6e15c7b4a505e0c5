// A volatility from the last returns in JavaScript, by what export_model made of a forecaster.
import { readFile } from "node:fs/promises";
import * as ort from "onnxruntime-web";

ort.env.wasm.numThreads = 1;
const session = await ort.InferenceSession.create(await readFile("forecaster.onnx"));
const rows = JSON.parse(await readFile("rows.json")); // of each day: the return, and other columns
const shape = [1, rows.length, rows[0].length];
const x = new ort.Tensor("float32", Float32Array.from(rows.flat()), shape);
const { volatility, interval } = await session.run({ x });
console.log(`volatility ${volatility.data.at(-1)}, 90 %: ${interval.data.slice(-2).join(" to ")}`);
