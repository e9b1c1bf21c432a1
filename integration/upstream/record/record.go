// Package record writes down what our calls in upstream's tests find: one JSON object a line, to
// the file that UPSTREAM_RECORD names.
package record

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
)

// Write writes one object down.
func Write(t testing.TB, one any) {
	t.Helper()
	line, err := json.Marshal(one)
	if err != nil {
		t.Fatal(err)
	}
	file, err := os.OpenFile(
		os.Getenv("UPSTREAM_RECORD"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if _, err := fmt.Fprintf(file, "%s\n", line); err != nil {
		t.Fatal(err)
	}
}

// Test returns the name of the test function, without those of subtests.
func Test(t testing.TB) string {
	test, _, _ := strings.Cut(t.Name(), "/")
	return test
}

// CallOf returns where upstream calls a helper: "FILE:LINE" of the first caller that is none of these
// functions.
func CallOf(helpers ...string) string {
	var calls [32]uintptr
	frames := runtime.CallersFrames(calls[:runtime.Callers(2, calls[:])])
	for {
		frame, more := frames.Next()
		name := frame.Function[strings.LastIndex(frame.Function, ".")+1:]
		if !more || !slices.Contains(helpers, name) {
			return fmt.Sprintf("%s:%d", filepath.Base(frame.File), frame.Line)
		}
	}
}

// How many cases of each test were met.
var met = map[string]int{}

// Next returns the line of the next case of a test whose cases run in the order of their table.
func Next(t testing.TB, lines []int) int {
	test := Test(t)
	met[test]++
	return lines[met[test]-1]
}
