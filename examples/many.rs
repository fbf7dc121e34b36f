//! Several prompts at once under a guard, each answer as it comes: `cargo run --example many -- MODEL.gguf GUARD "a prompt" "another" …`.

use pilotfish::Guard;
use pilotfish::engine::scheduler::{End, Event, Request, SchedulerOptions};
use pilotfish::engine::{Model, ModelOptions, Scheduler};
use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(model), Some(guard)) = (arguments.next(), arguments.next()) else {
        return Err("MODEL GUARD PROMPT …".into());
    };
    let template = Some("Instruction: {prompt}\nResponse:".to_owned());
    let options = ModelOptions { fallback_template: template, ..Default::default() };
    let model = Model::load(Path::new(&model), "model", &options)?;
    let guard = Guard::load(Path::new(&guard))?;
    let mut scheduler = Scheduler::guarded(&model, &[&guard], SchedulerOptions::default())?;
    for prompt in arguments {
        let tokens = model.prompt_tokens(&prompt)?;
        let request = scheduler.submit(Request::new(tokens, 64))?;
        println!("{request}: {prompt}");
    }
    // An app would take new requests between steps.
    let on_event = |event| match event {
        Event::Text { request, text } => println!("{request} says {text:?}"),
        Event::Token { .. } => {}
        Event::Ended { request, summary } => match summary.end {
            End::Blocked(reason) => println!("{request} is blocked: {reason}"),
            End::Failed(error) => println!("{request} failed: {error}"),
            _ => println!("{request} is done, {} tokens", summary.tokens),
        },
    };
    while scheduler.step(on_event)? {}
    Ok(())
}
