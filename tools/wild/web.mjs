// Runs a model in onnxruntime-web's WebAssembly: node web.mjs FOLDER_OF_NODE_MODULES MODEL FEEDS OUTPUTS.
// FEEDS is a JSON list of {name, type, dims, data}, data in base64; OUTPUTS gets the same for the graph outputs.
import fs from 'node:fs';
import { createRequire } from 'node:module';
import path from 'node:path';

const [modules, file, given, made] = process.argv.slice(2);
const ort = createRequire(path.join(modules, 'index.js'))('onnxruntime-web');
ort.env.wasm.numThreads = 1;
const kinds = { float32: Float32Array, int64: BigInt64Array, int32: Int32Array, uint8: Uint8Array, bool: Uint8Array };
const feeds = {};
for (const { name, type, dims, data } of JSON.parse(fs.readFileSync(given, 'utf-8'))) {
    const bytes = new Uint8Array(Buffer.from(data, 'base64'));
    feeds[name] = new ort.Tensor(type, new kinds[type](bytes.buffer, 0, bytes.length / kinds[type].BYTES_PER_ELEMENT), dims);
}
const session = await ort.InferenceSession.create(new Uint8Array(fs.readFileSync(file)), { executionProviders: ['wasm'] });
const results = await session.run(feeds);
const outputs = session.outputNames.map((name) => {
    const { type, dims, data } = results[name];
    return { name, type, dims, data: Buffer.from(data.buffer, data.byteOffset, data.byteLength).toString('base64') };
});
fs.writeFileSync(made, JSON.stringify(outputs));
