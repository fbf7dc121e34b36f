//! Numbers as people read them, in cells of tables.

use crate::eval::controls::Role;
use crate::eval::metrics::{Estimate, Proportion};
use maud::{Markup, html};

pub fn number(value: f64, digits: usize) -> String {
    if value.is_finite() { format!("{value:.digits$}") } else { "–".into() }
}

/// A figure, with its interval beneath.
pub fn estimate(Estimate { value, low, high }: Estimate, digits: usize) -> Markup {
    html! {
        (number(value, digits))
        @if value.is_finite() { " " span.interval { (number(low, digits)) "–" (number(high, digits)) } }
    }
}

/// A share as a percentage, with its interval beneath.
pub fn share(Proportion { share, low, high, .. }: Proportion) -> Markup {
    html! {
        (percent(share))
        @if share.is_finite() { " " span.interval { (number(100.0 * low, 1)) "–" (number(100.0 * high, 1)) } }
    }
}

pub fn percent(share: f64) -> String {
    if share.is_finite() { format!("{:.1} %", 100.0 * share) } else { "–".into() }
}

/// A cell of what does not apply, which says why to those who ask.
pub fn none(why: &str) -> Markup {
    html! { span.none title=(why) { "n/a" } }
}

pub fn class_of(role: Role) -> &'static str {
    match role {
        Role::Guard => "guard",
        Role::Native => "native",
        Role::Variant => "guard",
        Role::Base | Role::NoGuard | Role::Random | Role::WrongLayer | Role::SystemPrompt => "control",
    }
}

/// A table of `header` and rows of as many cells; the first is the row's name.
pub fn table(header: &[&str], rows: impl IntoIterator<Item = (Option<Role>, Vec<Markup>)>) -> Markup {
    html! {
        div.scroll {
            table {
                thead { tr { @for name in header { th scope="col" { (name) } } } }
                tbody {
                    @for (role, cells) in rows {
                        tr class=(role.map(class_of).unwrap_or_default()) {
                            @for (index, cell) in cells.into_iter().enumerate() {
                                @if index == 0 { th scope="row" { (cell) } } @else { td { (cell) } }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Names as they are elsewhere, without the marks that set them off in plain text.
pub fn text(text: impl Into<String>) -> Markup {
    let text: String = text.into().replace('`', "");
    html! { (text) }
}
