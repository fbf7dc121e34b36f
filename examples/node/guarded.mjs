// A guarded model in a JavaScript app, by node-llama-cpp, which is guarded as it is and asks what guards it over its socket:
//
//     pilotfish attach --guards GUARDS --control /run/user/1000/app.sock -- node guarded.mjs MODEL.gguf "a prompt" [THREADS]

import {once} from "node:events";
import {connect} from "node:net";
import {text} from "node:stream/consumers";
import {getLlama, LlamaChatSession} from "node-llama-cpp";

/** Asks the library in this process: a line of JSON there, and one back (docs/attach.md). */
async function ask(request) {
    const socket = connect(process.env.PILOTFISH_ATTACH_CONTROL);
    await once(socket, "connect");
    socket.end(JSON.stringify({version: 1, request}) + "\n");
    const {answer} = JSON.parse(await text(socket));
    if (answer.error) throw new Error(answer.error);
    return answer;
}

const [modelPath, prompt, threads] = process.argv.slice(2);
if (!process.env.PILOTFISH_ATTACH_CONTROL || !prompt) {
    console.error('usage: pilotfish attach --guards GUARDS --control SOCKET -- node guarded.mjs MODEL.gguf "a prompt" [THREADS]');
    process.exit(64);
}
try {
    const llama = await getLlama({gpu: false, build: "never", logLevel: "error", progressLogs: false, maxThreads: threads ? Number(threads) : undefined});
    const model = await llama.loadModel({modelPath});
    const context = await model.createContext({contextSize: 1024});
    const session = new LlamaChatSession({contextSequence: context.getSequence()});

    console.log(await session.prompt(prompt, {maxTokens: 48, temperature: 0}));

    const {status} = await ask("status");
    for (const {name, guards, problem} of status.in_force.models) console.error(`${name} is guarded by ${problem ?? (guards.join(", ") || "nothing")}`);
    const {score} = await ask({score: {text: prompt, form: "chat"}});
    for (const {guard, gate, score: value, fired} of score.gates) console.error(`${guard}, ${gate}: score ${value}, ${fired ? "fired" : "not fired"}`);
    // One prompt was answered, so what was ended is that.
    process.exitCode = status.counts.blocked > 0 ? 1 : 0;
    await llama.dispose();
} catch (error) {
    console.error(error);
    process.exitCode = 2;
}
