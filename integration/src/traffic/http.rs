//! A client for health checks and metrics.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::lab::Namespace;

/// How long connecting, and each read, may take.
const TIMEOUT: Duration = Duration::from_secs(5);

/// The answer to a GET.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// Status code.
    pub status: u16,
    /// Headers, with their names in lower case.
    pub headers: BTreeMap<String, String>,
    /// Body.
    pub body: String,
}

/// Asks `http://TO PATH` from a namespace. As HTTP/1.0, so that the answer is neither chunked nor
/// followed by anything. Fails when there is no answer, whatever the reason.
pub fn http_get(from: &Namespace, to: impl Into<SocketAddr>, path: &str) -> Result<Response> {
    let to = to.into();
    from.enter(|| get(to, path)).with_context(|| format!("get http://{to}{path}"))
}

fn get(to: SocketAddr, path: &str) -> Result<Response> {
    let mut stream = TcpStream::connect_timeout(&to, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: {to}\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    parse(&answer).with_context(|| format!("not HTTP: {answer:?}"))
}

fn parse(answer: &str) -> Option<Response> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let mut lines = head.split("\r\n");
    let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
    let headers = lines
        .map(|line| {
            let (name, value) = line.split_once(':')?;
            Some((name.to_ascii_lowercase(), value.trim().to_owned()))
        })
        .collect::<Option<_>>()?;
    Some(Response { status, headers, body: body.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_parsed() {
        let answer = "HTTP/1.1 503 Service Unavailable\r\nX-Weight:  0\r\n\r\n{\"a\":\r\n\r\n1}";
        let headers = [("x-weight".to_owned(), "0".to_owned())].into();
        let expected = Response { status: 503, headers, body: "{\"a\":\r\n\r\n1}".to_owned() };
        assert_eq!(parse(answer), Some(expected));
        assert_eq!(parse("HTTP/1.1 204 No Content\r\n\r\n").map(|r| r.status), Some(204));
        for wrong in ["", "0 pod-0 192.0.2.1:1\n", "HTTP/1.1\r\n\r\n", "HTTP/1.1 200\r\nx\r\n\r\n"]
        {
            assert_eq!(parse(wrong), None, "{wrong:?}");
        }
    }
}
