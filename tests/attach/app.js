// An app that knows nothing of Pilotfish: node app.js MODEL SEQUENCES [THREADS [GPU]]
// All layers are on the GPU, if one is given: "vulkan".
// Each line that it reads is a list of requests, [{"sequence": 0, "tokens": [...], "n": 8, "anew": true}, ...], which it answers at once, by a line with a list of answers.
// Tokens go behind what the sequence holds, if it is not begun anew.
import {createInterface} from "node:readline";
const {getLlama, LlamaLogLevel} = await import(process.env.NODE_LLAMA_CPP ?? "node-llama-cpp");

const [modelPath, sequences, threads = "1", gpu = false] = process.argv.slice(2);
// Tries its binary out in a process of its own, and where a loader runs Node.js its executable is not Node.js.
process.execPath = process.env.NODE_COMMAND ?? process.execPath;
const llama = await getLlama({gpu, build: "never", logLevel: LlamaLogLevel.error, progressLogs: false, maxThreads: Number(threads)});
const model = await llama.loadModel({modelPath, gpuLayers: gpu ? "max" : 0});
if (llama.gpu !== gpu || gpu && model.gpuLayers === 0) throw new Error(`${model.gpuLayers} layers are on ${llama.gpu}, and all were to be on ${gpu}`);
const context = await model.createContext({contextSize: 512, batchSize: 512, threads: Number(threads), sequences: Number(sequences)});
const all = Array.from({length: Number(sequences)}, () => context.getSequence());

async function answer({sequence, tokens, n, anew}) {
    const said = [], times = [];
    try {
        if (anew) await all[sequence].clearHistory();
        for await (const token of all[sequence].evaluate(tokens, {temperature: 0})) {
            said.push(token);
            times.push(performance.now());
            if (said.length >= n) break;
        }
    } catch (error) {
        return {text: model.detokenize(said), end: String(error.message ?? error)};
    }
    // The token that ends an answer is not shown.
    return {text: model.detokenize(said), end: said.length < n ? "stop" : "length", tokensPerSecond: 1000 * (times.length - 1) / (times.at(-1) - times[0])};
}

console.log("ready");
for await (const line of createInterface({input: process.stdin}))
    console.log(JSON.stringify(await Promise.all(JSON.parse(line).map(answer))));
await llama.dispose();
