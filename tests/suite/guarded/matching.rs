//! Interventions at the tokens of a text: which rows they act on, however the prompt is cut, and what is known of it.

use super::expected::Rows;
use super::*;
use pilotfish::engine::{Session, SessionOptions, tokens_spelling};
use pilotfish::program;
use std::collections::BTreeSet;

on_every_model!(
    the_tokens_of_a_text_are_patched_and_no_others,
    the_parts_of_a_prompt_change_no_patched_row,
    what_may_go_on_is_patched_where_it_is_not_known,
    a_sequence_that_is_taken_back_is_read_anew,
);

const LAYER: u32 = 1;

/// Within words and over them, and with a character of several bytes.
const TEXTS: [&str; 3] = ["ark eats thi", "|prod|", "sé"];

/// A prompt with every text in it, some of them twice, and an answer that has them too.
fn script(subject: &Subject) -> Script {
    let text = "the shark eats things |prod| in the sea |pro| passé and the shark eats things |prod|-like";
    Script { prompt: subject.tokens(text), answer: subject.more_tokens(" shark eats things |prod| sé") }
}

fn at(text: &str) -> Positions {
    Positions::Matching(text.into())
}

/// Adds to the tokens of `texts`, of each another vector.
fn guard(subject: &Subject, texts: &[&str]) -> Guard {
    let mut policy = subject.policy();
    for (index, text) in texts.iter().enumerate() {
        let name = format!("v{index}");
        policy = policy.vector(&name, LAYER).intervene(InterventionEntry { positions: at(text), ..add(&name) });
    }
    policy.guard()
}

/// Positions of a prompt's tokens that spell one of `texts`, but the first.
fn spelling(subject: &Subject, prompt: &[LlamaToken], texts: &[&str]) -> BTreeSet<usize> {
    let of = |text: &&str| tokens_spelling(subject.model.llama(), prompt, text);
    texts.iter().flat_map(of).filter(|position| *position > 0).collect()
}

/// Positions of the rows at [`LAYER`] that differ.
fn differing(a: &Rows, b: &Rows) -> BTreeSet<usize> {
    assert!(a.keys().eq(b.keys()));
    let at_layer = a.iter().zip(b.values()).filter(|(((_, layer, _), _), _)| *layer == LAYER);
    at_layer.filter(|((_, a), b)| a != b).map(|(((.., position), _), _)| *position).collect()
}

/// Reads a prompt in parts that end before `cuts`, with what follows each where that is `known`, then feeds the answer; the rows of all of it,
/// and the logits from the prompt's last token on.
fn read(
    subject: &Subject,
    context: &mut GuardedContext,
    script: &Script,
    cuts: &[usize],
    known: bool,
) -> (Rows, Vec<Vec<f32>>) {
    subject.capture(context);
    let ends = cuts.iter().copied().chain([script.prompt.len()]);
    let (mut start, mut logits) = (0, Vec::new());
    for end in ends {
        let (part, rest) = script.prompt[start..].split_at(end - start);
        let mut batch = GuardedBatch::new(part.len());
        if rest.is_empty() {
            let last = batch.add_prompt(ONLY, TokenPosition(start as i32), part).unwrap();
            context.decode(&mut batch).unwrap();
            logits.push(context.get_logits_ith(last).to_vec());
        } else {
            let rest = if known { rest } else { &[] };
            batch.add_prompt_part(ONLY, TokenPosition(start as i32), part, rest).unwrap();
            context.decode(&mut batch).unwrap();
        }
        start = end;
    }
    for (offset, token) in script.answer.iter().enumerate() {
        logits.push(step(context, ONLY, script.prompt.len() + offset, *token).unwrap());
    }
    (subject.rows(context), logits)
}

/// The positions that `guard` patches, by the same run without it: up to [`LAYER`] both have the same bits.
fn patched(subject: &Subject, guard: &Guard, script: &Script, cuts: &[usize], known: bool) -> BTreeSet<usize> {
    let (with, _) = read(subject, &mut subject.guarded(guard, params()), script, cuts, known);
    let (without, _) = read(subject, &mut subject.observed(), script, cuts, known);
    differing(&with, &without)
}

fn the_tokens_of_a_text_are_patched_and_no_others(subject: &Subject) {
    let script = script(subject);
    let sets = TEXTS.iter().map(std::slice::from_ref).chain([&TEXTS[..]]);
    for texts in sets {
        let what = format!("{}: {texts:?}", subject.name());
        let guard = guard(subject, texts);
        let expected = spelling(subject, &script.prompt, texts);
        assert!(!expected.is_empty() && expected.len() + 3 < script.prompt.len(), "{what}: {expected:?}");
        assert_eq!(patched(subject, &guard, &script, &[], true), expected, "{what}");
        // Each by its own vector.
        let found = script.run_captured(subject, &mut subject.guarded(&guard, params()));
        subject.expected(&[&guard], &script, |_, _, _| Vec::new()).assert_is(&what, &found);
    }
}

/// The largest distance of two runs' logits.
fn furthest(a: &[Vec<f32>], b: &[Vec<f32>]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| distance(a, &widened(b))).fold(0.0, f64::max)
}

fn the_parts_of_a_prompt_change_no_patched_row(subject: &Subject) {
    let script = script(subject);
    let n = script.prompt.len();
    let guard = guard(subject, &TEXTS);
    let expected = spelling(subject, &script.prompt, &TEXTS);
    let (_, whole) = read(subject, &mut subject.guarded(&guard, params()), &script, &[], true);
    let (_, unguarded) = read(subject, &mut subject.observed(), &script, &[], true);
    let sizes = if subject.is_quantized() { vec![1, 2, 7, 16] } else { (1..n).collect() };
    for size in sizes {
        let cuts: Vec<usize> = (1..n).filter(|cut| cut % size == 0).collect();
        let what = format!("{}: parts of {size}", subject.name());
        assert_eq!(patched(subject, &guard, &script, &cuts, true), expected, "{what}");
        // Besides, there is what another shape of batch does to the model itself.
        let (_, logits) = read(subject, &mut subject.guarded(&guard, params()), &script, &cuts, true);
        let (_, of_parts) = read(subject, &mut subject.observed(), &script, &cuts, true);
        let (off, unguarded) = (furthest(&logits, &whole), furthest(&of_parts, &unguarded));
        let tolerance = subject.tolerance().max(2.0 * unguarded);
        assert!(off <= tolerance, "{what}: logits are off by {off:.1e} of the norm, unguarded by {unguarded:.1e}");
    }
}

fn what_may_go_on_is_patched_where_it_is_not_known(subject: &Subject) {
    let script = Script { answer: Vec::new(), ..script(subject) };
    let guard = guard(subject, &TEXTS);
    let expected = spelling(subject, &script.prompt, &TEXTS);
    let vocab = subject.model.llama().vocab();
    let pieces = script.prompt.iter().map(|token| vocab.token_to_piece(*token, true, None));
    let pieces: Vec<Vec<u8>> = pieces.collect();
    let mut more = 0;
    for cut in 1..script.prompt.len() {
        let what = format!("{}: cut at {cut}", subject.name());
        // Tokens before the cut that a text would have if it went on there.
        let open = |text: &&str| {
            let with =
                |end: &[u8]| program::tokens_spelling(pieces[..cut].iter().map(Vec::as_slice).chain([end]), text);
            let ways = (0..text.len()).flat_map(|byte| with(&text.as_bytes()[byte..]));
            ways.filter(|position| (1..cut).contains(position)).collect::<Vec<_>>()
        };
        let may: BTreeSet<usize> = TEXTS.iter().flat_map(open).chain(expected.iter().copied()).collect();
        more += may.len() - expected.len();
        // A real model takes its time.
        if !subject.is_quantized() || may != expected || cut % 8 == 0 {
            assert_eq!(patched(subject, &guard, &script, &[cut], false), may, "{what}");
        }
    }
    assert!(more > 0, "{}: no cut leaves a text open", subject.name());
}

/// A text that was begun with tokens which are gone is not, and one that is begun anew is found.
fn a_sequence_that_is_taken_back_is_read_anew(subject: &Subject) {
    let guard = guard(subject, &TEXTS);
    let first = script(subject);
    let begun = *spelling(subject, &first.prompt, &TEXTS[1..2]).iter().next().unwrap();
    let second = subject.more_tokens(" the shark eats things |prod| so");
    let whole = [&first.prompt[..begun + 1], &second].concat();
    let begin = |context: &mut GuardedContext| {
        let first = Script { prompt: first.prompt.clone(), answer: Vec::new() };
        read(subject, context, &first, &[], true);
    };
    let go_on = |context: &mut GuardedContext, n: usize| {
        context.resume(ONLY, ONLY, n).unwrap();
        let mut batch = GuardedBatch::new(128);
        batch.add_prompt(ONLY, TokenPosition(n as i32), &whole[n..]).unwrap();
        context.decode(&mut batch).unwrap();
        subject.rows(context)
    };
    let (mut guarded, mut observed) = (subject.guarded(&guard, params()), subject.observed());
    begin(&mut guarded);
    begin(&mut observed);
    // A token before the text may be the beginning of another.
    let n = guarded.reusable(ONLY, begun);
    assert!((1..=begun).contains(&n), "{}: {n} of {begun}", subject.name());
    let refused = guarded.resume(ONLY, ONLY, begun + 1);
    assert!(matches!(refused, Err(ContextError::NotReusable { .. })), "{}: {refused:?}", subject.name());
    let found = differing(&go_on(&mut guarded, n), &go_on(&mut observed, n));
    let expected = spelling(subject, &whole, &TEXTS).into_iter().filter(|position| *position >= n);
    let expected: BTreeSet<usize> = expected.collect();
    assert!(expected.len() > 1 && !expected.contains(&begun), "{}: {expected:?}", subject.name());
    assert_eq!(found, expected, "{}", subject.name());
}

/// Whoever reads long prompts in parts says what follows: a text that is begun at the end of each and goes on at none is nowhere.
#[test]
fn sessions_say_what_follows() {
    for tiny in Tiny::all() {
        let guard = guard(&tiny, &[" the sea"]);
        let the = *tiny.more_tokens(" the").last().unwrap();
        let prompt = [tiny.tokens("").as_slice(), &vec![the; 700]].concat();
        let options = SessionOptions { n_ctx: 1024, ..Default::default() };
        let session = |guards: &[&Guard], prompt: &[LlamaToken]| {
            let mut session = Session::new(&tiny.model, guards, options).unwrap();
            let last = session.prefill(prompt).unwrap();
            session.logits(last).to_vec()
        };
        assert!(session(&[&guard], &prompt) == session(&[], &prompt), "{}", tiny.name());
        let with = [&prompt[..600], &tiny.more_tokens(" the sea")].concat();
        assert!(session(&[&guard], &with) != session(&[], &with), "{}: the guard does nothing", tiny.name());
    }
}
