use indicatif::{ProgressBar, ProgressStyle};

/// A bar on stderr, where stderr is a terminal.
pub struct Bar(ProgressBar);

impl Bar {
    pub fn new(what: &str) -> Self {
        let bar = ProgressBar::new(0);
        bar.set_style(
            ProgressStyle::with_template("{msg:28} {bar:30} {pos}/{len} {eta}")
                .expect("a template that is tried in every run"),
        );
        bar.set_message(what.to_owned());
        Self(bar)
    }

    /// A bar that counts bytes.
    pub fn bytes(what: &str) -> Self {
        let bar = Self::new(what);
        bar.0.set_style(
            ProgressStyle::with_template("{msg:28} {bar:30} {bytes}/{total_bytes} {bytes_per_sec}")
                .expect("a template that is tried in every run"),
        );
        bar
    }

    /// Prints a line above the bar, or on stderr where there is none.
    pub fn say(&self, line: &str) {
        if self.0.is_hidden() { eprintln!("{line}") } else { self.0.println(line) }
    }

    /// Told of steps done and in all. A new total starts the bar anew.
    pub fn at(&self, done: usize, total: usize) {
        self.0.set_length(total as u64);
        self.0.set_position(done as u64);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
