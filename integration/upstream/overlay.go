// How our calls get into upstream's tests: an overlay for the Go command, in which upstream's
// package stands in a directory of this module beside a file of ours. The copies with our calls in
// them are made from the module at hand, live in a scratch directory and are deleted at the end.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// An insertion is a call that is put into a function of upstream's.
type insertion struct {
	// The file and the function in it.
	file, function string
	// Where in the function, and what.
	place func(*token.FileSet, *ast.FuncDecl) (token.Pos, string, error)
}

// proxyInsertions record what the cases of upstream's tables about Services and endpoints are given and what they
// expect. The calls do not compile where upstream changed the tables' fields.
var proxyInsertions = []insertion{
	{"topology_test.go", "TestCategorizeEndpoints", atEndOfSubtest(`recordCategorization(
		t, %s, tc.nodeName, tc.nodeLabels, tc.preferSameEnabled, tc.serviceInfo, tc.endpoints,
		tc.clusterEndpoints, tc.localEndpoints, expectedAllEndpoints, expectedHasAnyEndpoints)`)},
	{"endpointslicecache_test.go", "TestEndpointsMapFromESC", atEndOfSubtest(`recordMap(
		t, %s, tc.hostname, tc.namespacedName, tc.endpointSlices, tc.expectedMap)`)},
	{"endpointslicecache_test.go", "TestEndpointInfoByServicePort", atEndOfSubtest(`recordByPort(
		t, %s, tc.hostname, tc.namespacedName, tc.endpointSlices, tc.expectedMap)`)},
	{"endpointslicecache_test.go", "TestEsDataChanged", atEndOfSubtest(`recordAlteration(
		t, %s, tc.initialSlice, tc.updatedSlice, tc.expectChanged)`)},
	{"endpointschangetracker_test.go", "TestUpdateEndpointsMap", atEndOfSubtest(`recordUpdate(
		t, %s, tc.previousEndpointSlices, tc.currentEndpointSlices, tc.previousEndpointsMap,
		tc.expectedResult, tc.expectedLocalEndpoints, tc.expectedChangedEndpoints)`)},
	{"servicechangetracker_test.go", "TestServiceToServiceMap", atEndOfSubtest(
		"recordReading(t, %s, tc.ipFamily, tc.service, tc.expected)")},
}

// addressInsertions record at which addresses upstream serves node ports.
var addressInsertions = []insertion{
	{"nodeport_addresses_test.go", "TestGetNodeIPs", atEndOfSubtest(`
		for line, family := %s, v1.IPv4Protocol; ; family = v1.IPv6Protocol {
			recordSelection(t, line, tc.cidrs, tc.itfAddrsPairs, family,
				tc.expected[family].ips, tc.expected[family].matchAll);
			if family == v1.IPv6Protocol { break }
		}`)},
}

// healthInsertions record what upstream answers about a Service, what happens to a proxy, and what
// upstream answers about that.
var healthInsertions = []insertion{
	{"healthcheck_test.go", "tHandler", atStart("recordService(%s, %s, %s, %s, %s, %s)")},
	{"proxy_health.go", "Updated", atStart("observe(%s, event{Updated: %s})")},
	{"proxy_health.go", "QueuedUpdate", atStart("observe(%s, event{Queued: %s})")},
	{"healthcheck_test.go", "testHTTPHandler", atEnd("observeQuestion(hsTest, status, payload)")},
	{"healthcheck_test.go", "TestHealthzServer", atEnd("recordLife(t, hs)")},
	{"healthcheck_test.go", "TestLivezServer", atEnd("recordLife(t, hs)")},
}

// cleanupInsertions record which connections upstream deletes.
var cleanupInsertions = []insertion{
	{"cleanup_test.go", "TestCleanStaleEntries", atEnd(
		"recordCleanup(t, %d, svc, eps, entriesBeforeCleanup, entriesAfterCleanup)")},
	{"cleanup_test.go", "TestServiceWithoutEndpoints", atEnd(
		"recordCleanup(t, %d, svc, eps, flows, actualEntries)")},
}

// flowInsertions record the objects that upstream's proxy is given, and the packets whose way
// through its ruleset upstream's tests check.
var flowInsertions = []insertion{
	{"proxier.go", "OnServiceUpdate", atStart("observeService(%s, %s, %s)")},
	{"proxier.go", "OnEndpointSliceAdd", atStart("observeSlice(%s, %s, true)")},
	{"proxier.go", "OnEndpointSliceUpdate", atStart("observeSlice(%s, %[3]s, true)")},
	{"proxier.go", "OnEndpointSliceDelete", atStart("observeSlice(%s, %s, false)")},
	{"proxier_test.go", "NewFakeProxier", beforeReturn("observeProxier(%s, %s)")},
	{"helpers_test.go", "runPacketFlowTests", atStart("recordFlows(%s, %s, %s, %s, %s)")},
}

// atStart puts a call at the start of the function. The call's verbs are the names of the receiver
// and of the parameters.
func atStart(call string) func(*token.FileSet, *ast.FuncDecl) (token.Pos, string, error) {
	return func(_ *token.FileSet, function *ast.FuncDecl) (token.Pos, string, error) {
		var names []any
		for _, list := range []*ast.FieldList{function.Recv, function.Type.Params} {
			if list == nil {
				continue
			}
			for _, field := range list.List {
				for _, name := range field.Names {
					names = append(names, name.Name)
				}
			}
		}
		return function.Body.Lbrace + 1, fmt.Sprintf(call, names...), nil
	}
}

// beforeReturn puts a call before the last statement. The call's verbs are what is returned.
func beforeReturn(call string) func(*token.FileSet, *ast.FuncDecl) (token.Pos, string, error) {
	return func(_ *token.FileSet, function *ast.FuncDecl) (token.Pos, string, error) {
		last := function.Body.List[len(function.Body.List)-1]
		result, ok := last.(*ast.ReturnStmt)
		if !ok {
			return 0, "", errors.New("it does not end with a return")
		}
		var names []any
		for _, value := range result.Results {
			name, ok := value.(*ast.Ident)
			if !ok {
				return 0, "", errors.New("it returns something without a name")
			}
			names = append(names, name.Name)
		}
		return result.Pos(), fmt.Sprintf(call, names...), nil
	}
}

// atEnd puts a call at the end of the function. A verb of the call is the function's line.
func atEnd(call string) func(*token.FileSet, *ast.FuncDecl) (token.Pos, string, error) {
	return func(files *token.FileSet, function *ast.FuncDecl) (token.Pos, string, error) {
		if strings.Contains(call, "%d") {
			call = fmt.Sprintf(call, files.Position(function.Pos()).Line)
		}
		return function.Body.Rbrace, call, nil
	}
}

// atEndOfSubtest puts a call at the end of the function that t.Run is given. The call's verb is the
// line at which the case stands in the function's table.
func atEndOfSubtest(call string) func(*token.FileSet, *ast.FuncDecl) (token.Pos, string, error) {
	return func(files *token.FileSet, function *ast.FuncDecl) (token.Pos, string, error) {
		var subtest *ast.FuncLit
		var line string
		ast.Inspect(function, func(node ast.Node) bool {
			switch node := node.(type) {
			case *ast.CallExpr:
				name, isSelector := node.Fun.(*ast.SelectorExpr)
				if isSelector && name.Sel.Name == "Run" && len(node.Args) == 2 {
					subtest, _ = node.Args[1].(*ast.FuncLit)
				}
			case *ast.AssignStmt:
				name, _ := node.Lhs[0].(*ast.Ident)
				table, isTable := node.Rhs[0].(*ast.CompositeLit)
				if name != nil && name.Name == "testCases" && isTable {
					line = caseLine(files, table)
				}
			}
			return true
		})
		if subtest == nil || line == "" {
			return 0, "", errors.New("it has no table of subtests")
		}
		return subtest.Body.Rbrace, fmt.Sprintf(call, line), nil
	}
}

// caseLine returns an expression for the line at which the first field of a table's case stands: by
// the case's name where the table is a map, else by how many were met.
func caseLine(files *token.FileSet, table *ast.CompositeLit) string {
	var lines, byName []string
	for _, element := range table.Elts {
		name := ""
		if pair, ok := element.(*ast.KeyValueExpr); ok {
			if key, ok := pair.Key.(*ast.BasicLit); ok {
				name = key.Value
			}
			element = pair.Value
		}
		if fields, ok := element.(*ast.CompositeLit); ok && len(fields.Elts) > 0 {
			line := strconv.Itoa(files.Position(fields.Elts[0].Pos()).Line)
			lines = append(lines, line)
			byName = append(byName, name+": "+line)
		}
	}
	if _, ok := table.Type.(*ast.MapType); ok {
		return "map[string]int{" + strings.Join(byName, ", ") + "}[name]"
	}
	return "nextLine(t, []int{" + strings.Join(lines, ", ") + "})"
}

// overlay writes the overlay of a source and returns its path.
func (source source) overlay(module, scratch string) (string, error) {
	ours, err := filepath.Abs(source.ours)
	if err != nil {
		return "", err
	}
	theirs := filepath.Join(module, filepath.FromSlash(source.theirs))
	files, err := filepath.Glob(filepath.Join(theirs, "*.go"))
	if err != nil {
		return "", err
	}
	replace := map[string]string{}
	for _, file := range files {
		name := filepath.Base(file)
		if _, err := os.Stat(filepath.Join(ours, name)); err == nil {
			return "", fmt.Errorf("upstream has a file called %s, too", name)
		}
		replace[filepath.Join(ours, name)] = file
	}
	edits := map[string][]insertion{}
	for _, insertion := range source.insertions {
		edits[insertion.file] = append(edits[insertion.file], insertion)
	}
	for name, insertions := range edits {
		edited, err := insert(filepath.Join(theirs, name), insertions)
		if err != nil {
			return "", fmt.Errorf("%s: %w", name, err)
		}
		copied := filepath.Join(scratch, source.ours+"-"+name)
		if err := os.WriteFile(copied, edited, 0o600); err != nil {
			return "", err
		}
		replace[filepath.Join(ours, name)] = copied
	}
	text, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		return "", err
	}
	path := filepath.Join(scratch, source.ours+".json")
	return path, os.WriteFile(path, text, 0o600)
}

// insert returns a file with calls inserted. No line of it moves.
func insert(file string, insertions []insertion) ([]byte, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	files := token.NewFileSet()
	tree, err := parser.ParseFile(files, file, text, parser.SkipObjectResolution)
	if err != nil {
		return nil, err
	}
	functions := map[string]*ast.FuncDecl{}
	for _, declaration := range tree.Decls {
		if function, ok := declaration.(*ast.FuncDecl); ok {
			functions[function.Name.Name] = function
		}
	}
	calls := map[int]string{}
	for _, insertion := range insertions {
		function := functions[insertion.function]
		if function == nil {
			return nil, fmt.Errorf("there is no function %s", insertion.function)
		}
		position, call, err := insertion.place(files, function)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", insertion.function, err)
		}
		calls[files.Position(position).Offset] = strings.Join(strings.Fields(call), " ")
	}
	var out bytes.Buffer
	for offset, char := range text {
		if call, ok := calls[offset]; ok {
			fmt.Fprintf(&out, " %s; ", call)
		}
		out.WriteByte(char)
	}
	return out.Bytes(), nil
}
