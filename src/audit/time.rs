use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The time in UTC, to the millisecond, rounded down: `2026-04-14T09:30:00.125Z`. Times that do not fit in four digits of a year are
/// shown as the first or last that does.
pub(super) fn rfc3339(time: SystemTime) -> String {
    const FIRST: i128 = -62_167_219_200_000;
    const LAST: i128 = 253_402_300_799_999;
    const DAY: i128 = 86_400_000;
    let nanoseconds = match time.duration_since(UNIX_EPOCH) {
        Ok(since) => since.as_nanos() as i128,
        Err(before) => -(before.duration().as_nanos() as i128),
    };
    let milliseconds = nanoseconds.div_euclid(Duration::from_millis(1).as_nanos() as i128).clamp(FIRST, LAST);
    let (year, month, day) = civil_from_days(milliseconds.div_euclid(DAY) as i64);
    let of_day = milliseconds.rem_euclid(DAY);
    let (hour, minute, second) = (of_day / 3_600_000, of_day / 60_000 % 60, of_day / 1000 % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:03}Z", of_day % 1000)
}

/// Year, month from 1 and day from 1, in the proleptic Gregorian calendar, of a day counted from 1970-01-01.
///
/// The algorithm is `civil_from_days` of Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms". It counts from March, so that
/// the leap day is the last of its year, in eras of 400 years, which all have 146,097 days.
pub(super) fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}
