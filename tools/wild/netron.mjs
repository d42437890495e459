// Opens a model with Netron's parser: node netron.mjs FOLDER_OF_NETRON MODEL. Prints what the viewer shows, as JSON.
import fs from 'node:fs';
import path from 'node:path';
import url from 'node:url';

const [folder, file] = process.argv.slice(2);
const load = (name) => import(url.pathToFileURL(path.join(folder, name)).href);
const base = await load('base.js');
const view = await load('view.js');
const raise = (error) => { throw error; };
const host = {
    name: 'node',
    type: 'Node',
    require: (id) => load(`${id}.js`),
    request: async (name, encoding) => fs.readFileSync(path.join(folder, name), encoding),
    environment: () => null,
    worker: () => null,
    event: () => {},
    exception: raise
};
const context = {
    identifier: path.basename(file),
    stream: new base.BinaryStream(new Uint8Array(fs.readFileSync(file))),
    entries: new Map(),
    request: host.request,
    require: host.require,
    error: raise,
    host
};
const model = await new view.ModelFactoryService(host).open(context);
const graph = model.modules[0];
const weights = graph.nodes.flatMap((node) => node.inputs).flatMap((argument) => argument.value ?? [])
    .filter((value) => value && value.initializer);
const names = (ports) => ports.map((port) => port.name);
console.log(JSON.stringify({
    nodes: graph.nodes.length,
    initializers: new Set(weights.map((value) => value.name)).size,
    inputs: names(graph.inputs),
    outputs: names(graph.outputs)
}));
