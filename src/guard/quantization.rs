//! Names of quantizations, which calibrations go by.

/// How llama.cpp calls the file types of `general.file_type` (`enum llama_ftype`), by their numbers.
const FILE_TYPES: [(u32, &str); 33] = [
    (0, "F32"),
    (1, "F16"),
    (2, "Q4_0"),
    (3, "Q4_1"),
    (7, "Q8_0"),
    (8, "Q5_0"),
    (9, "Q5_1"),
    (10, "Q2_K"),
    (11, "Q3_K_S"),
    (12, "Q3_K_M"),
    (13, "Q3_K_L"),
    (14, "Q4_K_S"),
    (15, "Q4_K_M"),
    (16, "Q5_K_S"),
    (17, "Q5_K_M"),
    (18, "Q6_K"),
    (19, "IQ2_XXS"),
    (20, "IQ2_XS"),
    (21, "Q2_K_S"),
    (22, "IQ3_XS"),
    (23, "IQ3_XXS"),
    (24, "IQ1_S"),
    (25, "IQ4_NL"),
    (26, "IQ3_S"),
    (27, "IQ3_M"),
    (28, "IQ2_S"),
    (29, "IQ2_M"),
    (30, "IQ4_XS"),
    (31, "IQ1_M"),
    (32, "BF16"),
    (36, "TQ1_0"),
    (37, "TQ2_0"),
    (38, "MXFP4_MOE"),
];

/// What a gate's figures of a model's file go by: the quantization that its GGUF names (`general.file_type`), or where it names none the bytes of its
/// tensors, which differ between the quantizations of a model too.
pub fn quantization_name(file_type: Option<&str>, n_bytes: u64) -> String {
    match file_type.and_then(|number| number.parse::<u32>().ok()) {
        Some(number) => FILE_TYPES
            .iter()
            .find(|(known, _)| *known == number)
            .map_or_else(|| format!("file-type-{number}"), |(_, name)| (*name).to_owned()),
        None => format!("{n_bytes}-bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_named_by_its_type_or_else_its_size() {
        assert_eq!(quantization_name(Some("15"), 7), "Q4_K_M");
        assert_eq!(quantization_name(Some("99"), 7), "file-type-99");
        assert_eq!(quantization_name(Some("odd"), 7), "7-bytes");
        assert_eq!(quantization_name(None, 7), "7-bytes");
    }
}
