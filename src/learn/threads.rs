use super::{LearnError, Progress};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

/// What `work` makes of every one of `items`, in their order, on all cores. The caller's thread reports progress. The first error to come
/// ends it.
pub fn each<T: Sync, R: Send>(
    items: &[T],
    progress: Progress<'_>,
    work: impl Fn(&T) -> Result<R, LearnError> + Sync,
) -> Result<Vec<R>, LearnError> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(items.len());
    let next = AtomicUsize::new(0);
    let (sender, receiver) = mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            let (sender, next, work) = (sender.clone(), &next, &work);
            scope.spawn(move || {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(item) = items.get(index) else { break };
                    // Nobody listens any more after another thread's error.
                    if sender.send((index, work(item))).is_err() {
                        break;
                    }
                }
            });
        }
        drop(sender);
        let mut done = Vec::with_capacity(items.len());
        for (index, result) in receiver {
            done.push((index, result?));
            progress(done.len(), items.len());
        }
        done.sort_by_key(|(index, _)| *index);
        Ok(done.into_iter().map(|(_, result)| result).collect())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_keep_their_order_and_an_error_ends_it() {
        let items: Vec<u64> = (0..100).collect();
        let mut reported = Vec::new();
        let doubled = each(&items, &mut |done, all| reported.push((done, all)), |item| Ok(item * 2)).unwrap();
        assert_eq!(doubled, items.iter().map(|item| item * 2).collect::<Vec<_>>());
        assert_eq!(reported, (1..=100).map(|done| (done, 100)).collect::<Vec<_>>());
        let failing = |item: &u64| {
            if *item == 7 { Err(LearnError::NoPairs { documents: 7 }) } else { Ok(()) }
        };
        assert!(matches!(each(&items, &mut |_, _| (), failing), Err(LearnError::NoPairs { documents: 7 })));
        assert!(each(&[] as &[u64], &mut |_, _| (), |item| Ok(*item)).unwrap().is_empty());
    }
}
