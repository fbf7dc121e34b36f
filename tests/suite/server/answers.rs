//! Answers, in OpenAI's shapes.

use super::*;
use crate::support::done;

#[test]
fn an_answer_is_the_one_that_the_command_gives() {
    let fixture = Fixture::new(&[]);
    let server = Server::start(&["--model", fixture.model()]);
    for prompt in ["the sea", "pilot fish sea sea", "a"] {
        let alone = done(&["run", "--raw", "--model", fixture.model(), "-p", prompt, "--max-tokens", "12", "--json"]);
        let alone: Value = serde_json::from_str(&alone).unwrap();
        let served = server.done("/v1/completions", &greedy(prompt));
        assert_eq!(served["choices"][0]["text"], alone["text"], "{prompt}");
        assert_eq!(served["object"], "text_completion");
        assert_eq!(served["usage"]["completion_tokens"], alone["tokens"]);
        let finish = &served["choices"][0]["finish_reason"];
        assert_eq!(finish, &alone["finish"], "{prompt}");
    }
}

#[test]
fn a_stream_says_what_the_whole_answer_says() {
    let fixture = Fixture::new(&[]);
    let server = Server::start(&["--model", fixture.model()]);
    let messages = json!([{ "role": "system", "content": "sea" }, { "role": "user", "content": "pilot fish" }]);
    let mut body =
        json!({ "messages": messages, "temperature": 0, "max_tokens": 10, "logprobs": true, "top_logprobs": 2 });
    let whole = server.done("/v1/chat/completions", &body);
    assert_eq!(whole["choices"][0]["message"]["role"], "assistant");
    body["stream"] = true.into();
    body["stream_options"] = json!({ "include_usage": true });
    let answer = server.post("/v1/chat/completions", &body);
    assert_eq!(answer.headers["content-type"], "text/event-stream");
    let events = answer.events();
    assert_eq!(events.last().unwrap(), "[DONE]");
    let chunks: Vec<Value> =
        events[..events.len() - 1].iter().map(|event| serde_json::from_str(event).unwrap()).collect();
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let said: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(whole["choices"][0]["message"]["content"], said.as_str());
    // The second time the prompt is not read again, which moves a probability in its seventh digit.
    let told = |token: &Value| (token["bytes"].clone(), token["top_logprobs"].as_array().unwrap().len());
    let lists = chunks.iter().filter_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array());
    let tokens: Vec<_> = lists.flatten().map(told).collect();
    let at_once = whole["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(tokens, at_once.iter().map(told).collect::<Vec<_>>());
    assert_eq!(tokens.len(), whole["usage"]["completion_tokens"].as_u64().unwrap() as usize);
    let last = &chunks[chunks.len() - 1];
    assert_eq!(last["choices"], json!([]));
    let counts = |usage: &Value| (usage["prompt_tokens"].clone(), usage["completion_tokens"].clone());
    assert_eq!(counts(&last["usage"]), counts(&whole["usage"]));
    let finished = &chunks[chunks.len() - 2];
    assert_eq!(finished["choices"][0]["finish_reason"], whole["choices"][0]["finish_reason"]);
    assert_eq!(finished["guard"]["epoch"], 1);
}

#[test]
fn probabilities_are_those_of_the_tokens_that_were_taken() {
    let fixture = Fixture::new(&[]);
    let server = Server::start(&["--model", fixture.model()]);
    let body = json!({ "prompt": "the sea", "temperature": 0, "max_tokens": 6, "logprobs": 20 });
    let answer = server.done("/v1/completions", &body);
    let found = &answer["choices"][0]["logprobs"];
    let list = |key: &str| found[key].as_array().unwrap().clone();
    let (tokens, taken, likeliest) = (list("tokens"), list("token_logprobs"), list("top_logprobs"));
    assert_eq!((tokens.len(), taken.len(), likeliest.len()), (6, 6, 6));
    for (taken, likeliest) in taken.iter().zip(&likeliest) {
        let highest = likeliest.as_object().unwrap().values().map(|p| p.as_f64().unwrap()).fold(f64::MIN, f64::max);
        // Greedy takes the likeliest.
        assert_eq!(taken.as_f64().unwrap(), highest);
        assert!(highest < 0.0);
    }
    let fields = json!({ "prompt": "the sea", "temperature": 0, "max_tokens": 1, "logprobs": 1 });
    let first = server.done("/v1/completions", &fields)["choices"][0]["text"].clone();
    let banned: Vec<i32> = (0..2000).collect();
    let biases: serde_json::Map<String, Value> = banned.iter().map(|token| (token.to_string(), json!(-100))).collect();
    let refused = server.post("/v1/completions", &json!({ "prompt": "a", "logit_bias": biases }));
    assert_eq!(refused.error()["param"], "logit_bias", "the vocabulary is smaller than that");
    let again = json!({ "prompt": "the sea", "temperature": 0, "max_tokens": 1, "n": 1 });
    assert_eq!(server.done("/v1/completions", &again)["choices"][0]["text"], first);
    // The token that was taken lies in one half of the vocabulary: banned there, another comes.
    let n_vocab = server.get("/v1/models").json()["data"][0]["meta"]["n_vocab"].as_u64().unwrap();
    let without = |tokens: std::ops::Range<u64>| {
        let bans: serde_json::Map<String, Value> = tokens.map(|token| (token.to_string(), json!(-100))).collect();
        let body = json!({ "prompt": "the sea", "temperature": 0, "max_tokens": 1, "logit_bias": bans });
        server.done("/v1/completions", &body)["choices"][0]["text"].clone()
    };
    let halves = [without(0..n_vocab / 2), without(n_vocab / 2..n_vocab)];
    assert_eq!(halves.iter().filter(|text| **text == first).count(), 1, "{first}: {halves:?}");
}

#[test]
fn choices_differ_and_seeds_repeat_them() {
    let fixture = Fixture::new(&[]);
    let server = Server::start(&["--model", fixture.model()]);
    let body =
        json!({ "prompt": ["sea", "fish"], "n": 2, "seed": 5, "max_tokens": 16, "temperature": 1.5, "stop": ["zzz"] });
    let texts = |answer: &Value| -> Vec<Value> {
        answer["choices"].as_array().unwrap().iter().map(|choice| choice["text"].clone()).collect()
    };
    let first = server.done("/v1/completions", &body);
    let indices: Vec<_> = first["choices"].as_array().unwrap().iter().map(|choice| choice["index"].clone()).collect();
    assert_eq!(indices, [0, 1, 2, 3]);
    assert_ne!(texts(&first)[0], texts(&first)[1]);
    assert_eq!(texts(&first), texts(&server.done("/v1/completions", &body)));
    let other = json!({ "prompt": ["sea", "fish"], "n": 2, "seed": 6, "max_tokens": 16, "temperature": 1.5 });
    assert_ne!(texts(&first), texts(&server.done("/v1/completions", &other)));
}

#[test]
fn wrong_requests_are_told_what_is_wrong() {
    let fixture = Fixture::new(&[]);
    let server = Server::start(&["--model", fixture.model(), "--context", "64"]);
    let chat = |extra: Value| {
        let mut body = json!({ "messages": [{ "role": "user", "content": "sea" }], "max_tokens": 1 });
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        server.post("/v1/chat/completions", &body)
    };
    for (extra, param) in [
        (json!({ "temperature": "hot" }), "temperature"),
        (json!({ "temperature": 3 }), "temperature"),
        (json!({ "top_p": 2 }), "top_p"),
        (json!({ "n": 0 }), "n"),
        (json!({ "n": 1000 }), "n"),
        (json!({ "stop": 3 }), "stop"),
        (json!({ "logit_bias": { "x": 1 } }), "logit_bias"),
        (json!({ "top_logprobs": 2 }), "top_logprobs"),
        (json!({ "stream": 1 }), "stream"),
        (json!({ "tools": [{ "type": "function" }] }), "tools"),
        (json!({ "response_format": { "type": "xml" } }), "response_format"),
        (json!({ "response_format": { "type": "json_schema", "json_schema": {} } }), "response_format"),
        (
            json!({ "response_format": { "type": "json_schema", "json_schema": { "schema": { "type": "nothing" } } } }),
            "response_format",
        ),
        (json!({ "guard": { "interventions": { "none": "off" } } }), "guard.interventions"),
        (
            json!({ "response_format": { "type": "json_schema", "json_schema": { "schema": { "$ref": "#" } } } }),
            "response_format",
        ),
        (json!({ "tools": { "a": 1 } }), "tools"),
        (json!({ "guard": { "what": 1 } }), "guard"),
        (json!({ "guard": { "disable": "all" } }), "guard.disable"),
        (json!({ "guard": { "disable": [1] } }), "guard.disable"),
        (json!({ "guard": { "disable": ["none"] } }), "guard.disable"),
        (json!({ "messages": [{ "role": "user", "content": "sea ".repeat(100) }] }), "messages"),
    ] {
        let answer = chat(extra.clone());
        assert_eq!((answer.status, answer.error()["param"].as_str()), (400, Some(param)), "{extra}: {answer:?}");
    }
    // What is wrong with a prompt is said before a stream begins; what nothing can be said under, when it is found.
    for stream in [false, true] {
        for prompt in [json!([999_999]), json!([])] {
            let answer = server.post("/v1/completions", &json!({ "prompt": [prompt], "stream": stream }));
            assert_eq!((answer.status, answer.error()["param"].as_str()), (400, Some("prompt")), "{answer:?}");
        }
    }
    let n_vocab = server.get("/v1/models").json()["data"][0]["meta"]["n_vocab"].as_i64().unwrap();
    let bans: serde_json::Map<_, _> = (0..n_vocab).map(|token| (token.to_string(), json!(-100))).collect();
    for temperature in [0, 1] {
        let banned =
            server.post("/v1/completions", &json!({ "prompt": "sea", "logit_bias": bans, "temperature": temperature }));
        assert_eq!((banned.status, banned.error()["code"].as_str()), (400, Some("invalid_body")), "{banned:?}");
    }
    for path in ["/v1/models/%FF", "/v1/guards/%FF"] {
        let answer = server.request(if path.contains("guards") { "PATCH" } else { "GET" }, path, None, b"{}");
        assert_eq!((answer.status, answer.error()["code"].as_str()), (404, Some("not_found")), "{path}");
    }
    let many: Vec<&str> = vec!["sea"; 64];
    let small = Server::start_with(&["--model", fixture.model()], &[("PILOTFISH_SERVE__LIMITS__QUEUE", "8")]);
    assert_eq!(small.post("/v1/guard/score", &json!({ "input": many })).status, 400);
    // As OpenAI does, what is not known is let be.
    assert_eq!(chat(json!({ "user": "me", "made_up": [1], "tools": [], "metadata": {} })).status, 200);
    assert_eq!(server.get("/v1/nothing").error()["code"], "not_found");
    assert_eq!(server.get("/v1/chat/completions").status, 405);
    let models = server.get("/v1/models").json();
    assert_eq!(models["data"][0]["id"], "tiny");
    assert_eq!(server.get("/v1/models/tiny").json()["object"], "model");
    assert_eq!(server.get("/v1/models/other").status, 404);
}

#[test]
fn a_gate_scores_texts_and_blocks() {
    let fixture = Fixture::new(&["--on-fire", "block"]);
    let guards = directory(&fixture, &["sharks"]);
    let server = Server::start(&["--model", fixture.model(), "--guards", text(&guards)]);
    let sharks = "shark sea sea sea sea";
    let scores = server.done("/v1/guard/score", &json!({ "input": [sharks, "pilot fish sea sea sea"] }));
    let flagged: Vec<_> =
        scores["results"].as_array().unwrap().iter().map(|result| result["flagged"].clone()).collect();
    assert_eq!(flagged, [true, false]);
    let gate = &scores["results"][0]["gates"][0];
    assert_eq!((gate["guard"].as_str(), gate["gate"].as_str()), (Some("shark-gate"), Some("sharks")));
    assert!(gate["score"].as_f64().unwrap() > 0.0);

    let ask = |content: &str, stream: bool| {
        let messages = json!([{ "role": "user", "content": content }]);
        server.post("/v1/chat/completions", &json!({ "messages": messages, "max_tokens": 4, "stream": stream }))
    };
    let blocked = ask(sharks, false);
    assert_eq!((blocked.status, blocked.headers["x-pilotfish-blocked"].as_str()), (200, "true"));
    assert_eq!(
        (blocked.headers["x-pilotfish-acted"].as_str(), blocked.headers["x-pilotfish-epoch"].as_str()),
        ("shark-gate", "1")
    );
    let choice = &blocked.json()["choices"][0];
    assert_eq!(choice["finish_reason"], "content_filter");
    assert_eq!(choice["message"]["content"], "");
    assert!(!choice["message"]["refusal"].as_str().unwrap().is_empty());
    assert_eq!(choice["guard"]["blocked_by"]["gate"], "sharks");
    let passed = ask("pilot fish sea sea sea", false);
    assert_eq!(
        (passed.headers["x-pilotfish-blocked"].as_str(), passed.headers["x-pilotfish-acted"].as_str()),
        ("false", "")
    );

    let events = ask(sharks, true).events();
    let last: Value = serde_json::from_str(&events[events.len() - 2]).unwrap();
    assert_eq!(last["choices"][0]["finish_reason"], "content_filter");
    assert_eq!(last["guard"], json!({ "epoch": 1, "acted": ["shark-gate"], "blocked": true }));
    let metrics = server.get("/metrics").body;
    assert!(metrics.contains("pilotfish_blocked_total{guard=\"shark-gate\"} 2"), "{metrics}");
}

#[test]
fn a_request_sets_a_guard_for_itself_as_far_as_its_key_may() {
    let fixture = steering("4");
    let guards = directory(&fixture, &["steer"]);
    let keys = keys(&fixture, &[("app", "user", ""), ("lab", "trusted", ""), ("boss", "admin", "")]);
    let server = Server::start(&["--model", fixture.model(), "--guards", text(&guards), "--keys", text(&keys)]);
    let name =
        server.request("GET", "/v1/guards", Some("sk-app"), b"").json()["data"][0]["interventions"][0]["name"].clone();
    let name = name.as_str().unwrap().to_owned();
    let ask = |key: &str, setting: Option<Value>| {
        let mut body = greedy("the sea");
        if let Some(setting) = setting {
            body["guard"] = json!({ "interventions": { &name: setting } });
        }
        server.request("POST", "/v1/completions", Some(key), body.to_string().as_bytes())
    };
    let said = |answer: Answer| answer.json()["choices"][0]["text"].clone();
    let guarded = said(ask("sk-app", None));
    assert_eq!(ask("sk-app", Some(json!("off"))).status, 403);
    assert_eq!(ask("sk-app", Some(json!(-4))).status, 403);
    let stronger = ask("sk-app", Some(json!(8)));
    assert_eq!((stronger.status, stronger.headers["x-pilotfish-acted"].as_str()), (200, "shark-gate"));
    let by_its_guard =
        json!({ "prompt": "sea", "max_tokens": 1, "guard": { "interventions": { format!("shark-gate/{name}"): 8 } } });
    assert_eq!(
        server.request("POST", "/v1/completions", Some("sk-app"), by_its_guard.to_string().as_bytes()).status,
        200
    );
    let free = ask("sk-lab", Some(json!("off")));
    let plain = Server::start(&["--model", fixture.model()]);
    assert_eq!(free.headers["x-pilotfish-acted"], "");
    let free = said(free);
    assert_eq!(free, plain.done("/v1/completions", &greedy("the sea"))["choices"][0]["text"]);
    assert_ne!(free, guarded);
    assert_eq!(said(ask("sk-lab", None)), guarded);

    for (key, status) in [("sk-app", 403), ("sk-lab", 403), ("nobody", 401)] {
        assert_eq!(server.patch("/v1/guards/steer", Some(key), &json!({ "enabled": false })).status, status, "{key}");
    }
    let changed = server.patch("/v1/guards/steer", Some("sk-boss"), &json!({ "interventions": { &name: 0 } }));
    assert_eq!((changed.status, changed.json()["epoch"].as_u64()), (200, Some(2)));
    assert_eq!(said(ask("sk-app", None)), free);
    assert_eq!(ask("sk-app", Some(json!(4))).json()["choices"][0]["text"], guarded);
    let reset = server.patch("/v1/guards/steer", Some("sk-boss"), &json!({ "interventions": { &name: null } }));
    assert_eq!(reset.json()["data"][0]["interventions"][0]["strength"], 4.0);
    let off = server.patch("/v1/guards/steer", Some("sk-boss"), &json!({ "enabled": false })).json();
    assert_eq!((off["data"][0]["in_force"].as_bool(), off["epoch"].as_u64()), (Some(false), Some(4)));
    assert_eq!(said(ask("sk-app", None)), free);
    for (path, body, status) in [
        ("/v1/guards/none", json!({ "enabled": true }), 404),
        ("/v1/guards/steer", json!({}), 400),
        ("/v1/guards/steer", json!({ "interventions": { "none": 1 } }), 400),
    ] {
        let body = if path.ends_with("steer") && !body.as_object().unwrap().is_empty() {
            json!({ "enabled": true, "interventions": body["interventions"] })
        } else {
            body
        };
        assert_eq!(server.patch(path, Some("sk-boss"), &body).status, status, "{path} {body}");
    }
    for nonsense in [json!("off"), json!(null)] {
        let body = json!({ "enabled": false, "interventions": { "none": nonsense } });
        assert_eq!(server.patch("/v1/guards/steer", Some("sk-boss"), &body).status, 400, "{body}");
    }
    // What was refused has changed nothing.
    assert_eq!(server.epoch(), 4);
}

#[test]
fn gates_are_read_token_by_token() {
    let fixture = Fixture::new(&["--on-fire", "block"]);
    let guards = directory(&fixture, &["sharks"]);
    let server = Server::start(&["--model", fixture.model(), "--guards", text(&guards)]);
    let score = |content: &str, per_token: bool| {
        let scores = server.done("/v1/guard/score", &json!({ "input": content, "per_token": per_token }));
        scores["results"][0].clone()
    };
    let content = "pilot fish sea shark sea";
    let whole = score(content, false);
    assert!(whole.get("pieces").is_none());
    let read = score(content, true);
    let scored = |result: &Value| result["gates"][0]["score"].as_f64().unwrap();
    // Batches of other shapes round otherwise.
    assert!((scored(&read) - scored(&whole)).abs() < 1e-4, "{read} and {whole}");
    let pieces = read["pieces"].as_array().unwrap();
    assert_eq!(pieces.len() as u64, read["tokens"].as_u64().unwrap());
    let spelt: String = pieces.iter().map(|piece| piece["text"].as_str().unwrap()).collect();
    assert!(spelt.contains(content), "{spelt}");
    let scores: Vec<Option<f64>> = pieces.iter().map(|piece| piece["scores"][0].as_f64()).collect();
    assert!(
        scores[0].is_none() && scores[1..].iter().all(Option::is_some),
        "the first position counts for no gate: {scores:?}"
    );
    // The fixture's gate goes by the prompt's last token.
    let of_prompt = scored(&read);
    let last = scores.last().unwrap().unwrap();
    assert!((last - of_prompt).abs() < 1e-4, "{last} and {of_prompt}");
    // What another request has read is not read again, and told all the same.
    let again = score(content, true);
    assert_eq!(again["pieces"].as_array().unwrap().len(), pieces.len());
    assert!((scored(&again) - of_prompt).abs() < 1e-4, "{again} and {read}");
    // A gate that fires blocks the answer, not the reading.
    let fired = score("shark sea sea sea sea", true);
    assert_eq!(fired["flagged"], true);
    assert_eq!(fired["pieces"].as_array().unwrap().len() as u64, fired["tokens"].as_u64().unwrap());
}

#[test]
fn a_request_goes_without_guards_where_its_key_may() {
    let fixture = Fixture::new(&["--on-fire", "block"]);
    let guards = directory(&fixture, &["sharks", "others"]);
    replace(&guards.join("others/guard.toml"), |text| text.replace("name = \"shark-gate\"", "name = \"second\""));
    let keys = keys(&fixture, &[("app", "user", ""), ("lab", "trusted", "")]);
    let server = Server::start(&["--model", fixture.model(), "--guards", text(&guards), "--keys", text(&keys)]);
    let ask = |key: &str, disable: Value| {
        let body = json!({ "prompt": "shark sea sea sea sea", "temperature": 0, "max_tokens": 6, "guard": { "disable": disable } });
        server.request("POST", "/v1/completions", Some(key), body.to_string().as_bytes())
    };
    for disable in [json!(true), json!(["second"])] {
        assert_eq!(ask("sk-app", disable).status, 403);
    }
    let blocked_by = |answer: &Answer| answer.json()["choices"][0]["guard"]["blocked_by"]["guard"].clone();
    assert_eq!(blocked_by(&ask("sk-app", json!(false))), "second", "folders in order: others, sharks");
    assert_eq!(blocked_by(&ask("sk-lab", json!([]))), "second");
    // By the guard's own name, and by its folder's.
    for name in ["second", "others"] {
        let one = ask("sk-lab", json!([name]));
        assert_eq!(blocked_by(&one), "shark-gate");
        assert_eq!(one.json()["choices"][0]["guard"]["gates"].as_array().unwrap().len(), 1);
        assert_eq!(one.headers["x-pilotfish-epoch"], "1");
    }
    let free = ask("sk-lab", json!(true));
    assert_eq!((free.status, free.headers["x-pilotfish-blocked"].as_str()), (200, "false"));
    let plain = Server::start(&["--model", fixture.model()]);
    let said = plain.done(
        "/v1/completions",
        &json!({ "prompt": "shark sea sea sea sea", "temperature": 0, "max_tokens": 6, "guard": { "disable": true } }),
    );
    assert_eq!(free.json()["choices"][0]["text"], said["choices"][0]["text"]);
    assert_eq!(
        ask("sk-lab", json!(true)).json()["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().map(|n| n > 0),
        Some(true)
    );
    // The others are not touched by it.
    assert_eq!(blocked_by(&ask("sk-app", json!(null))), "second");
}

/// A model of random weights says nothing of its own that is JSON.
#[test]
fn an_answer_keeps_to_its_form() {
    let fixture = Fixture::new(&[]);
    let server = Server::start(&["--model", fixture.model()]);
    let schema = json!({
        "type": "object",
        "properties": { "fish": { "enum": ["pilot", "shark"] }, "big": { "type": "boolean" }, "n": { "type": "integer", "minimum": 3, "maximum": 7 } },
        "required": ["fish", "big", "n"],
        "additionalProperties": false,
    });
    let format = json!({ "type": "json_schema", "json_schema": { "name": "fish", "strict": true, "schema": schema } });
    for seed in 0..4 {
        let messages = json!([{ "role": "user", "content": "sea" }]);
        let body = json!({ "messages": messages, "response_format": format, "seed": seed, "temperature": 1.5, "n": 2 });
        let answer = server.done("/v1/chat/completions", &body);
        for choice in answer["choices"].as_array().unwrap() {
            assert_eq!(choice["finish_reason"], "stop", "{choice}");
            let said: Value = serde_json::from_str(choice["message"]["content"].as_str().unwrap()).unwrap();
            assert!(["pilot", "shark"].contains(&said["fish"].as_str().unwrap()) && said["big"].is_boolean(), "{said}");
            assert!((3..=7).contains(&said["n"].as_i64().unwrap()) && said.as_object().unwrap().len() == 3, "{said}");
        }
    }
    let body =
        json!({ "prompt": "sea", "response_format": { "type": "json_object" }, "max_tokens": 30, "temperature": 0 });
    let text = server.done("/v1/completions", &body)["choices"][0]["text"].as_str().unwrap().to_owned();
    assert!(text.starts_with('{'), "{text}");
}
