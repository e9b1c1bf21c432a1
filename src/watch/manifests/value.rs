//! A value of any type and of bounded size.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

/// How many fields and elements an object may have, all in all. Those that the API server takes
/// are smaller than 3 MiB and have fewer.
pub(super) const MOST_FIELDS: usize = 500_000;

/// Reads a value that has no more fields and elements than are left; those that it has are taken
/// off. Without such a bound a text of some MiB could ask for GiB of memory, because a few bytes
/// are enough for a mapping.
pub(super) struct Bounded<'a> {
    pub(super) left: &'a mut usize,
}

impl Bounded<'_> {
    fn take<E: Error>(&mut self) -> Result<Bounded<'_>, E> {
        let left = self.left.checked_sub(1).ok_or_else(|| {
            E::custom(format!("an object with more than {MOST_FIELDS} fields is not read"))
        })?;
        *self.left = left;
        Ok(Bounded { left: self.left })
    }
}

impl<'de> DeserializeSeed<'de> for Bounded<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Bounded<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("anything that JSON can say")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    /// Numbers that JSON has no word for are nothing, as for `serde_json` itself.
    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        self.deserialize(deserializer)
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut seq: A) -> Result<Value, A::Error> {
        let mut elements = Vec::new();
        while let Some(element) = seq.next_element_seed(self.take()?)? {
            elements.push(element);
        }
        Ok(Value::Array(elements))
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Value, A::Error> {
        let mut fields = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            let value = map.next_value_seed(self.take()?)?;
            fields.insert(key, value);
        }
        Ok(Value::Object(fields))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(text: &str, mut left: usize) -> Result<(Value, usize), String> {
        let value = Bounded { left: &mut left }
            .deserialize(&mut serde_json::Deserializer::from_str(text))
            .map_err(|error| error.to_string())?;
        Ok((value, left))
    }

    #[test]
    fn reads_what_json_can_say() {
        let value = json!({"a": [1, -1, 1.5, true, null, "x"], "b": {"c": {}}});
        let (got, _) = read(&value.to_string(), 100).unwrap();
        assert_eq!(got, value);
        let yaml = "a: [1, -1, 1.5, true, null, x]\nb: {c: {}}\n";
        let mut left = 100;
        let read =
            |de: serde_saphyr::Deserializer<'_, '_>| Bounded { left: &mut left }.deserialize(de);
        assert_eq!(serde_saphyr::with_deserializer_from_str(yaml, read).unwrap(), value);
    }

    #[test]
    fn is_bounded() {
        let text = json!({"a": [1, 2, 3], "b": {"c": 1}}).to_string();
        assert!(read(&text, 5).is_err_and(|error| error.contains("is not read")));
        assert!(read(&text, 20).is_ok_and(|(_, left)| left <= 14));
        // What is nested counts too.
        let nested = format!("{}{}", "[".repeat(100), "]".repeat(100));
        assert!(read(&nested, 50).is_err_and(|error| error.contains("is not read")));
        assert!(read(&nested, 200).is_ok());
    }
}
